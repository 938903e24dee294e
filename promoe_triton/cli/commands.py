"""All commands of ``promoe-triton``.

Exit codes: 0 done, 1 the command failed (or tokens differ), 2 it was used wrongly, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from promoe_triton._version import __version__
from promoe_triton.cli.demo import demo
from promoe_triton.cli.evaluate import evaluate
from promoe_triton.cli.generate import generate
from promoe_triton.cli.inspect import inspect
from promoe_triton.cli.output import print_error, readable_logging
from promoe_triton.cli.simulate import simulate_command
from promoe_triton.cli.trace import trace
from promoe_triton.cli.train import train_command
from promoe_triton.cli.tune import tune
from promoe_triton.errors import PromoeError


class Commands(TyperGroup):
    """All commands; what they raise becomes one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (PromoeError, OSError) as error:
            print_error(error)
            raise typer.Exit(1) from error
        except ValueError as error:
            print_error(error)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print_error("interrupted")
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run Mixture-of-Experts models whose experts rest on disk or in RAM from a few slots of faster memory.",
)


def print_version(value: bool) -> None:
    if value:
        typer.echo(f"promoe-triton {__version__}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, transformers included.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    ctx.with_resource(readable_logging(verbose))
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


app.command()(demo)
app.command()(evaluate)
app.command()(generate)
app.command()(inspect)
app.command("simulate")(simulate_command)
app.command()(trace)
app.command("train")(train_command)
app.command()(tune)


def main() -> None:
    """Run the command line."""
    app(prog_name="promoe-triton")
