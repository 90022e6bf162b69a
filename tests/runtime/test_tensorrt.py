"""What TensorRT refuses is reported in one line. Running engines needs a GPU: tests/plugins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from sinkrt.backends.tensorrt import Engine
from sinkrt.backends.tensorrt_library import create
from sinkrt.errors import BackendError


class Runtime:
    """What pybind11 makes where TensorRT returns none."""

    def __init__(self, logger: SimpleNamespace) -> None:
        logger.errors.extend(logger.logged)
        raise TypeError("pybind11::init(): factory function returned nullptr")


@pytest.mark.parametrize(
    ("logged", "reason"),
    [
        (
            ["CUDA initialization failure with error: 35", "and what follows"],
            "CUDA initialization failure with error: 35",
        ),
        ([], "pybind11::init(): factory function returned nullptr"),
    ],
)
def test_no_driver_is_reported_with_tensorrts_reason(logged: list[str], reason: str) -> None:
    logger = SimpleNamespace(errors=[], logged=logged)
    with pytest.raises(BackendError) as caught:
        create(Runtime, logger)
    assert str(caught.value).startswith(f"TensorRT's Runtime: received {reason}, expected ")
    assert logger.errors == []  # the next failure is reported with its own reason


def test_an_address_that_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "decode.engine").write_bytes(b"engine")
    engine = MagicMock(num_io_tensors=1)
    engine.get_tensor_name.return_value = "ids"
    context = engine.create_execution_context.return_value
    runtime = MagicMock()
    runtime.deserialize_cuda_engine.return_value = engine
    logger = SimpleNamespace(errors=[])
    decode = Engine(runtime, logger, "decode", tmp_path / "decode.engine")
    context.set_tensor_address.return_value = True
    decode.bind({"ids": SimpleNamespace(address=256)})
    context.set_tensor_address.return_value = False
    logger.errors.append("not aligned")
    with pytest.raises(BackendError, match="decode engine: 'ids': received not aligned, expected an address"):
        decode.bind({"ids": SimpleNamespace(address=1)})
