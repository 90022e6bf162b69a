"""The web page's files: open to all, closed to what comes from elsewhere. `make test-clients` uses it in Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sinkexport.serve.page import PAGES

from tests.exporter.serve.serving import MANY, Served, serving
from tests.runtime.toy import build_toy


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    bundle: Path = build_toy(tmp_path_factory.mktemp("page") / "toy", MANY)
    with serving(bundle, api_key="k" * 20) as served:
        yield served


@pytest.fixture(scope="module")
def files(served: Served) -> dict[str, str]:
    return {path: httpx.get(served.url + path).text for path in PAGES}


@pytest.mark.parametrize(
    ("path", "kind"), [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")]
)
def test_the_files_need_no_key_and_allow_nothing_from_elsewhere(served: Served, path: str, kind: str) -> None:
    response = httpx.get(served.url + path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert httpx.head(served.url + path).status_code == 200
    assert httpx.post(served.url + path).status_code == 401, "all but reading needs the key"


def test_nothing_else_is_open(served: Served) -> None:
    for path in ("/v1/models", "/metrics", "/page", "/page.map", "/index.html", "//page.js"):
        assert httpx.get(served.url + path).status_code == 401, path


def test_the_page_holds_together(files: dict[str, str]) -> None:
    ids = set(re.findall(r'id="([a-z-]+)"', files["/"]))
    assert set(re.findall(r'\bat\("([a-z-]+)"\)', files["/page.js"])) <= ids
    for text in files.values():
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
    assert not re.search(r"<[^>]+\son[a-z]+=|<style|<script(?! src)|style=", files["/"]), (
        "nothing inline: the policy forbids it"
    )


def test_models_have_what_the_page_shows(served: Served) -> None:
    answer = httpx.get(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {'k' * 20}"}).json()
    assert answer["data"][0]["stream"] == {"num_sink_tokens": MANY.num_sink_tokens, "window_size": MANY.window_size}
