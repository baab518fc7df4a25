"""The command ``openmm-bg``: parses, calls the workflow, prints."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence

from openmm_bg.errors import InputError
from openmm_bg.version import __version__

_DESCRIPTION = """\
Boltzmann generators for OpenMM: a network proposes whole conformations together with their exact
probability density, and molecular dynamics accepts or rejects them exactly.

  openmm-bg run alanine_dipeptide --output results/ala2     from nothing to an ensemble and report.html
  openmm-bg run my.pdb --temperature 310 --output results/mine
  openmm-bg run alanine_dipeptide --output results/ala2 --resume
"""
_EPILOG = """\
A folder holds one run: molecule.pdb, system.xml, generator.bg, trajectory.dcd (MD with moves), moves.csv
(every attempt), summary.json and report.html. A run that was stopped goes on with --resume.
The steps of `run` can be taken one by one: simulate, train, sample, compare.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        options.do(options, shlex.join(["openmm-bg", *given]))
    except InputError as error:
        print(f"openmm-bg: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        folder = getattr(options, "output", None)
        hint = f"; what is done is in {folder}, go on with --resume" if folder else ""
        print(f"\nopenmm-bg: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openmm-bg", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"openmm_bg {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="from a molecule to an exact ensemble and a report, all steps")
    _begin(run)
    run.set_defaults(do=_start, last="report")
    first = commands.add_parser("simulate", help="the first step alone: data by replica exchange, and plain MD")
    _begin(first)
    first.set_defaults(do=_start, last="simulate")
    for step, purpose in {
        "train": "the second step: a generator from the data of a folder",
        "sample": "the third step: draws with weights, and MD with moves",
        "compare": "the last step: summary.json and report.html",
    }.items():
        command = commands.add_parser(step, help=purpose, description=purpose)
        command.add_argument("--output", required=True, metavar="DIR", help="the folder of a run that was begun")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.set_defaults(do=_continue, last="report" if step == "compare" else step)
    listing = commands.add_parser("systems", help="the molecules and densities that are known by name")
    listing.set_defaults(do=_systems)
    return parser


def _begin(parser: argparse.ArgumentParser) -> None:
    from_here = parser.add_argument_group("what")
    from_here.add_argument("molecule", help="a name (see `openmm-bg systems`) or a PDB file with all hydrogens")
    from_here.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    from_here.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    from_here.add_argument("--temperature", type=float, metavar="K", help="default: the molecule's, 300")
    from_here.add_argument(
        "--forcefield",
        nargs="+",
        metavar="XML",
        help="OpenMM force field files (default amber99sbildn.xml amber99_obc.xml)",
    )
    how = parser.add_argument_group("how much")
    how.add_argument("--seed", type=int, metavar="N")
    how.add_argument("--flow", choices=("spline", "realnvp"))
    how.add_argument("--exchange-iterations", type=int, metavar="N", help="replica exchange, 500 steps each")
    how.add_argument("--likelihood-steps", type=int, metavar="N", help="training on the data")
    how.add_argument("--training-steps", type=int, metavar="N", help="training on the energy")
    how.add_argument("--md-steps", type=int, metavar="N", help="plain MD to compare with")
    how.add_argument("--production-steps", type=int, metavar="N", help="MD with moves")
    how.add_argument("--proposals-per-iteration", type=int, metavar="N", help="moves tried every 500 steps")
    how.add_argument("--samples", type=int, metavar="N", help="independent draws of the generator")
    how.add_argument(
        "--rehearsal",
        action="store_true",
        help="every step in about a minute, to see that all works; its numbers mean little",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _start(options: argparse.Namespace, command: str) -> None:
    from openmm_bg import workflow

    settings = workflow.RunSettings.rehearsal() if options.rehearsal else workflow.RunSettings()
    names = {field.name for field in dataclasses.fields(settings)}
    chosen = {name: value for name, value in vars(options).items() if name in names and value is not None}
    settings = dataclasses.replace(settings, **chosen)
    forcefield = {} if options.forcefield is None else {"forcefield": tuple(options.forcefield)}
    with workflow.Run.start(
        options.molecule, options.output, settings, resume=options.resume, command=command,
        say=_say, progress=not options.quiet, **forcefield,
    ) as run:  # fmt: skip
        run.run(options.last)


def _continue(options: argparse.Namespace, command: str) -> None:
    from openmm_bg import workflow

    with workflow.Run.open(options.output, say=_say, progress=not options.quiet) as run:
        run.run(options.last)


def _systems(options: argparse.Namespace, command: str) -> None:
    from openmm_bg import systems

    width = max(map(len, systems.names()))
    for name in systems.names():
        print(f"{name:{width}}  {systems.describe(name)}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
