"""Build the engines of all graphs of a bundle, and record them in its manifest."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from sinkrt.contract import MANIFEST_NAME, SCHEMA_VERSION, EngineFacts, Manifest, check_files, hash_file, load_manifest
from sinkrt.contract.constants import ENGINE_FOLDER, PLUGIN_ABI, PLUGIN_FILE
from sinkrt.errors import UsageError, problem

from sinkexport.tensorrt.options import BuildOptions, EngineReport
from sinkexport.tensorrt.process import build_engine_apart
from sinkexport.util.files import write_whole
from sinkexport.util.progress import Report, silent


def build_bundle(
    bundle: Path, options: BuildOptions, report: Report = silent, *, debug: bool = False
) -> dict[str, tuple[EngineFacts, EngineReport]]:
    """Build an engine for each graph, and write the manifest when all are there.

    Each engine has its own copy of the weights: TensorRT cannot share them between engines. An engine without weights
    could be refitted from the bundle's file, but would hold a copy on the device all the same.

    Raises: UsageError, BackendError, BundleError; EngineBuildError if TensorRT crashed.
    """
    report("check", 0, 1)
    manifest = load_manifest(bundle)
    _refuse(bundle, manifest, options)
    check_files(bundle, manifest)
    report("check", 1, 1)
    built: dict[str, tuple[EngineFacts, EngineReport]] = {}
    for role, graph in sorted(manifest.graphs.items()):
        report(role, 0, 1)
        file = f"{ENGINE_FOLDER}/{role}.engine"
        done = build_engine_apart(bundle / graph.file, bundle / file, options, debug=debug)
        written = hash_file(bundle / file)
        facts = EngineFacts(
            file=file,
            bytes=written.bytes,
            sha256=written.sha256,
            graph_sha256=manifest.files[graph.file].sha256,
            flavour=done.flavour,
            version=done.tensorrt,
            plugin_abi=done.plugin_abi,
            gpu=done.gpu,
            compute_capability=done.compute_capability,
            precision=manifest.weights_dtype,
        )
        built[role] = (facts, done)
        report(role, 1, 1)
    if options.plugin is not None and (bundle / PLUGIN_FILE).resolve() != options.plugin.resolve():
        shutil.copyfile(options.plugin, bundle / PLUGIN_FILE)  # a session finds it beside the engines
    changed = dataclasses.replace(
        manifest, schema_version=SCHEMA_VERSION, engines={role: facts for role, (facts, _) in built.items()}
    )
    write_whole(bundle / MANIFEST_NAME, changed.to_json(), "manifest")
    return built


def _refuse(bundle: Path, manifest: Manifest, options: BuildOptions) -> None:
    if manifest.target != "tensorrt":
        raise UsageError(
            problem(
                "bundle",
                received=f"'{bundle}', exported for target {manifest.target}",
                expected="target tensorrt",
                fix="export with --target tensorrt",
            )
        )
    if manifest.plugin_abi not in (None, PLUGIN_ABI):
        raise UsageError(
            problem(
                "bundle",
                received=f"'{bundle}', whose graphs have nodes of plugin ABI {manifest.plugin_abi}",
                expected=f"plugin ABI {PLUGIN_ABI}",
                fix="export the model again, or build with the version that exported it",
            )
        )
    if manifest.plugin_abi is not None and options.plugin is None:
        raise UsageError(
            problem(
                "--plugin",
                received="nothing",
                expected="the plugin library that the graphs need",
                fix="pass --plugin (plugins/README.md), or export with --native",
            )
        )
    if manifest.plugin_abi is None and options.plugin is not None:
        raise UsageError(
            problem(
                "--plugin",
                received=f"'{options.plugin}'",
                fix="leave it out",
                expected="nothing: this bundle has standard operators only",
            )
        )
    if options.plugin is not None and not options.plugin.is_file():
        raise UsageError(
            problem(
                "--plugin",
                received=f"no file at '{options.plugin}'",
                expected="the library libsinkexport_plugin.so",
                fix="build it as plugins/README.md says",
            )
        )
    for path in filter(None, [options.timing_cache]):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(
                problem(
                    "--timing-cache",
                    received=f"'{path}'",
                    expected="a file in a folder that exists",
                    fix="check the path",
                )
            )
