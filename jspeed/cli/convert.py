"""`jspeed convert`: between jspeed's checkpoints and Hugging Face's layout.

Nothing here imports JAX before a command has prepared the environment.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jspeed.cli.environment import prepare_jax_on_cpu

convert_app = typer.Typer(
    help="Convert between jspeed's checkpoints and Hugging Face's layout.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]


class DType(StrEnum):
    """What weights are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _size(text: str) -> int:
    """The bytes of "5GB"."""
    found = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", text.strip().upper())
    if found is None or int(found[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a size, as 5GB or 500MB.")
    return int(found[1]) * _UNITS[found[2]]


@convert_app.command("hf-to-jspeed")
def hf_to_jspeed(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder as save_pretrained writes it.")
    ],
    out: OutFolder,
) -> None:
    """Make a checkpoint of a model in Hugging Face's layout."""
    prepare_jax_on_cpu()
    from jspeed.engine.hf_export import import_folder

    tag, parameters = import_folder(source, out)
    typer.echo(f"{out / tag}: {parameters:,} parameters in float32, without optimizer state.")


@convert_app.command("jspeed-to-hf")
def jspeed_to_hf(
    source: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A run's folder, or one of its checkpoints."),
    ],
    out: OutFolder,
    tag: Annotated[
        str | None, typer.Option("--tag", help="Which checkpoint of a run; the latest if not said.")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option("--dtype", help="Of the weights; as the model came, or float32.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Of one file, as 5GB.")
    ] = "50GB",
) -> None:
    """Write a checkpoint as transformers reads it: config.json, safetensors, tokenizer."""
    limit = _size(max_shard_size)
    prepare_jax_on_cpu()
    from jspeed.engine.hf_export import export_checkpoint

    found = export_checkpoint(
        source, out, tag=tag, dtype=dtype.value if dtype else None, max_shard_size=limit
    )
    names = ", ".join(sorted(path.name for path in out.iterdir()))
    typer.echo(f"checkpoint {found} is in {out}: {names}")
