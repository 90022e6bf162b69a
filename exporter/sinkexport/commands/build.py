"""``sinkexport build``: TensorRT engines of a bundle's graphs."""

from __future__ import annotations

from pathlib import Path

import click

from sinkexport.commands.options import bundle_argument, file_option
from sinkexport.tensorrt.options import FLAVOURS, BuildOptions
from sinkexport.util.process_memory import MIB
from sinkexport.util.progress import shown_progress

STAGES = {
    "check": "Checking the bundle",
    "decode": "Building the decode engine",
    "prefill": "Building the prefill engine",
}
MAX_UINT32 = (1 << 32) - 1


@click.command(name="build")
@bundle_argument
@file_option(
    "--plugin",
    metavar="PATH",
    help="libsinkexport_plugin.so (plugins/README.md); not for bundles exported with --native.",
)
@click.option(
    "--flavour",
    type=click.Choice(list(FLAVOURS)),
    default="auto",
    show_default=True,
    help="auto: TensorRT if it is installed, else TensorRT-RTX.",
)
@click.option(
    "--workspace",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Most scratch memory of a layer.  [default: TensorRT's]",
)
@file_option(
    "--timing-cache",
    help="Read if it is there, written afterwards: the next build is quicker. Not for RTX.",
)
@click.option(
    "--tactic-sources",
    type=click.IntRange(0, MAX_UINT32),
    metavar="BITS",
    help="TensorRT's TacticSource bits; 0 builds without cuBLAS and cuDNN (TensorRT 8).  [default: TensorRT's]",
)
@click.pass_context
def command(
    context: click.Context,
    bundle: Path,
    plugin: Path | None,
    flavour: str,
    workspace: int | None,
    timing_cache: Path | None,
    tactic_sources: int | None,
) -> None:
    """Build TensorRT engines for the bundle DIR, which was exported with --target tensorrt, into DIR/engines.

    TensorRT builds for the GPU of this machine and needs it; TensorRT-RTX needs none. Each engine holds the weights.
    The manifest says what was built for what; engines that were there are replaced.
    """
    from sinkexport.tensorrt.build_engines import build_bundle
    from sinkexport.tensorrt.process import EngineBuildError

    options = BuildOptions(
        plugin=plugin,
        workspace_bytes=None if workspace is None else workspace * MIB,
        timing_cache=timing_cache,
        tactic_sources=tactic_sources,
        modules=FLAVOURS[flavour],
    )
    try:
        with shown_progress(STAGES) as show:
            built = build_bundle(bundle, options, show, debug=context.find_root().params["debug"])
    except EngineBuildError as error:  # not the user's mistake
        click.echo(f"sinkexport: error: {error}", err=True)
        context.exit(1)
    for role, (facts, report) in built.items():
        click.echo(
            f"{bundle / facts.file}: {role}, {facts.flavour} {facts.version}, "
            f"{facts.gpu or 'any GPU it supports'}, "
            f"{report.num_layers} layers, {facts.bytes / 1e6:.1f} MB, {report.build_s:.1f} s"
        )
        for warning in report.warnings:
            click.echo(f"TensorRT warns of {role}: {warning}", err=True)
