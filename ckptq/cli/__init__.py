"""The command line. Each command parses, makes one library call, and shows one result.

Imports stand inside the commands, so that `--help` loads neither torch nor transformers.
"""

from __future__ import annotations

import typer

from ckptq.cli.calibrate_command import calibrate
from ckptq.cli.evaluate_command import evaluate
from ckptq.cli.inspect_command import inspect
from ckptq.cli.mend_command import mend
from ckptq.cli.options import Version
from ckptq.cli.permute_command import permute
from ckptq.cli.quantize_command import quantize
from ckptq.cli.recipes_command import recipes
from ckptq.cli.search_command import search
from ckptq.cli.verify_command import verify
from ckptq.distributed.ranks import started
from ckptq.errors import UsageError

app = typer.Typer(
    name="ckptq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


DIVIDED = ("quantize", "calibrate", "verify", "evaluate")
"""The commands whose work torchrun's processes divide; all others run in one."""


@app.callback()
def program(context: typer.Context, version: Version = False) -> None:
    """Quantize Hugging Face checkpoints for vLLM, offline, and prove that the result is right."""
    command = context.invoked_subcommand
    if started().world > 1 and command not in DIVIDED:
        raise UsageError(
            f"{command} runs in one process; torchrun is for {', '.join(DIVIDED[:-1])} and "
            f"{DIVIDED[-1]}"
        )


for _command in (quantize, calibrate, verify, mend, permute, evaluate, search, inspect, recipes):
    app.command()(_command)
