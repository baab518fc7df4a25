"""The command ``openmm-bg``: parses, calls the workflow, prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from openmm_bg import cli_compare
from openmm_bg.errors import InputError
from openmm_bg.version import __version__

_DESCRIPTION = """\
Boltzmann generators for OpenMM: a network proposes whole conformations together with their exact
probability density, and molecular dynamics accepts or rejects them exactly.

  openmm-bg run alanine_dipeptide --output results/ala2     from nothing to an ensemble and report.html
  openmm-bg run "ACE SER NME"                               a peptide by its residues, into results/ACE-SER-NME
  openmm-bg run my.pdb --temperature 310                    into results/my
  openmm-bg run my.pdb --resume
  openmm-bg run my.pdb --budget 10min                       ten minutes of learning, and the best of it
  openmm-bg run my.pdb --scheduler tcp://10.0.0.1:8786      its walkers on the workers of a Dask cluster
  openmm-bg compare md.dcd samples.dcd --top my.pdb         whether two trajectories of a molecule are the same
  openmm-bg doctor                                          whether this installation works
"""
_EPILOG = """\
A folder holds one run: molecule.pdb, system.xml, generator.bg, trajectory.dcd (MD with moves), moves.csv
(every attempt), summary.json and report.html. A run that was stopped goes on with --resume.
The steps of `run` can be taken one by one: simulate, train, sample, report.
"""
_BUDGET = "what training and its walkers may cost, in place of a number of steps: 10min, or 1e7 energy evaluations"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"openmm-bg: {message} (see `{self.prog} --help`).\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        return int(options.do(options, shlex.join(["openmm-bg", *given])) or 0)
    except InputError as error:
        print(f"openmm-bg: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # whoever read the output has seen enough; nothing may be flushed into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # a full disk, a folder without permission: nothing the user could read off a traceback
        reason = error.strerror or type(error).__name__
        place = "" if error.filename is None else f": {error.filename}"
        print(f"openmm-bg: {reason}{place}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nopenmm-bg: interrupted{_hint(options)}.", file=sys.stderr)
        return 130


def _hint(options: argparse.Namespace) -> str:
    if getattr(options, "output", None) is None:
        return ""
    again = "--resume" if hasattr(options, "resume") else "the same command"
    return f"; what is done is in {options.output}, go on with {again}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="openmm-bg", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"openmm_bg {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for step, last, purpose in (
        ("run", "report", "from a molecule to an exact ensemble and a report, all steps"),
        ("simulate", "simulate", "the first step alone: plain MD for comparison, and with --data exchange the data"),
    ):
        command = commands.add_parser(step, help=purpose, description=purpose, allow_abbrev=False)
        _begin(command)
        command.set_defaults(do=_start, last=last, json=False)
        if last == "report":
            command.add_argument("--json", action="store_true", help="print summary.json, and nothing else")
    for step, last, purpose in (
        ("train", "train", "the second step: a generator, from walkers that it moves itself or from the exchange"),
        ("sample", "sample", "the third step: draws with weights, and MD with moves"),
    ):
        command = commands.add_parser(step, help=purpose, description=purpose, allow_abbrev=False)
        command.add_argument("--output", required=True, metavar="DIR", help="the folder of a run that was begun")
        if step == "train":
            command.add_argument("--budget", metavar="B", help=_BUDGET)
            _where(command, "workers", "scheduler", "device")
        else:
            _where(command, "platform")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.set_defaults(do=_continue, first=step, last=last)
    purpose = "the last step: summary.json and report.html"
    command = commands.add_parser("report", help=purpose, description=purpose, allow_abbrev=False)
    command.add_argument("output", metavar="FOLDER", help="the folder of a run whose steps are done")
    command.add_argument("--json", action="store_true", help="print summary.json, and nothing else")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    command.set_defaults(do=_report)
    purpose = "whether two trajectories of one molecule are the same, and what differs"
    cli_compare.add_arguments(commands.add_parser("compare", help=purpose, allow_abbrev=False))
    purpose = "the molecules and densities that are known by name"
    command = commands.add_parser("systems", help=purpose, description=purpose, allow_abbrev=False)
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(do=_systems)
    purpose = "whether this installation works: versions, platforms, GPU, compiler"
    command = commands.add_parser("doctor", help=purpose, description=purpose, allow_abbrev=False)
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(do=_doctor)
    return parser


def _begin(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument(
        "molecule",
        help="a name (see `openmm-bg systems`), residues such as 'ACE ALA NME', or a PDB file with all hydrogens",
    )
    what.add_argument("--output", metavar="DIR", help="a new or empty folder (default results/NAME of the molecule)")
    what.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, or begin it where there is none"
    )
    what.add_argument("--temperature", type=float, metavar="K", help="default: the molecule's, 300")
    what.add_argument(
        "--forcefield",
        nargs="+",
        metavar="XML",
        help="OpenMM force field files for residues or a PDB file (default amber99sbildn.xml amber99_obc.xml)",
    )
    how = parser.add_argument_group("how much")
    how.add_argument("--seed", type=int, metavar="N")
    how.add_argument("--flow", choices=("spline", "realnvp"))
    how.add_argument(
        "--data",
        choices=("adaptive", "exchange"),
        help="walkers that the generator moves while it learns from them (default), or replica exchange beforehand",
    )
    how.add_argument("--walkers", type=int, metavar="N", help="adaptive: how many (default 128)")
    how.add_argument("--rounds", type=int, metavar="N", help="adaptive: the most (default 8)")
    how.add_argument("--round-steps", type=int, metavar="N", help="adaptive: MD of each walker in one (default 5000)")
    how.add_argument("--ladders", type=int, metavar="N", help="exchange: how many side by side (default 16)")
    how.add_argument("--exchange-iterations", type=int, metavar="N", help="exchange: frames of each ladder")
    how.add_argument("--highest-temperature", type=float, metavar="K", help="at which walkers start (default 1000)")
    how.add_argument("--likelihood-steps", type=int, metavar="N", help="training on the data")
    how.add_argument("--training-steps", type=int, metavar="N", help="training on the energy, the last if adaptive")
    how.add_argument("--budget", metavar="B", help=_BUDGET)
    how.add_argument("--md-steps", type=int, metavar="N", help="plain MD to compare with")
    how.add_argument("--production-steps", type=int, metavar="N", help="MD with moves")
    how.add_argument("--steps-per-iteration", type=int, metavar="N", help="MD between series of moves (default 500)")
    how.add_argument("--proposals-per-iteration", type=int, metavar="N", help="moves in one series (default 10)")
    how.add_argument("--samples", type=int, metavar="N", help="independent draws of the generator")
    how.add_argument(
        "--rehearsal",
        action="store_true",
        help="every step in well under a minute, to see that all works; its numbers mean little",
    )
    _where(parser, *_WHERE)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


_WHERE = {
    "workers": {"type": int, "metavar": "N", "help": "processes that move walkers (default: one for each core)"},
    "scheduler": {"metavar": "ADDRESS", "help": "a Dask scheduler that does, such as tcp://10.0.0.1:8786"},
    "device": {"metavar": "DEVICE", "help": "of training and of molecules in a batch: cpu (default), cuda or cuda:1"},
    "platform": {"metavar": "NAME", "help": "of OpenMM, for single simulations (default: the fastest on one core)"},
}


def _where(parser: argparse.ArgumentParser, *names: str) -> None:
    where = parser.add_argument_group("where; but for rounding the result does not depend on it")
    for name in names:
        where.add_argument(f"--{name}", **_WHERE[name])


def _resources(options: argparse.Namespace) -> Any:
    from openmm_bg.workflow import Resources

    given = {name: getattr(options, name, None) for name in _WHERE}
    return Resources(**{name: value for name, value in given.items() if value is not None})


def _start(options: argparse.Namespace, command: str) -> None:
    from openmm_bg import workflow
    from openmm_bg.workflow.source import folder_name

    if options.output is None:
        options.output = os.path.join("results", folder_name(options.molecule))
    with workflow.Run.start(
        options.molecule, options.output, _settings(options),
        forcefield=None if options.forcefield is None else tuple(options.forcefield), resume=options.resume,
        command=command, say=_hush if options.json else _say, progress=not options.quiet,
        resources=_resources(options),
    ) as run:  # fmt: skip
        run.run(options.last)
        if options.json:
            _say(run.path("summary.json").read_text())


def _settings(options: argparse.Namespace) -> Any:
    """What was asked for; None where nothing was, so that a run that is resumed keeps its own."""
    from openmm_bg.workflow.settings import RunSettings

    names = {field.name for field in dataclasses.fields(RunSettings)}
    chosen = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if not chosen and not options.rehearsal:
        return None
    if options.budget is not None and options.training_steps is not None:
        raise InputError("--budget takes the place of --training-steps; give one of them.")
    if options.rehearsal:
        return dataclasses.replace(RunSettings.rehearsal(options.data or RunSettings.data), **chosen)
    return RunSettings(**chosen)


def _continue(options: argparse.Namespace, command: str) -> None:
    from openmm_bg import workflow

    with workflow.Run.open(options.output, say=_say, progress=not options.quiet, resources=_resources(options)) as run:
        if getattr(options, "budget", None) is not None:
            run.set_budget(options.budget)
        run.run(options.last, options.first)


def _report(options: argparse.Namespace, command: str) -> None:
    from openmm_bg import workflow

    say = _hush if options.json else _say
    with workflow.Run.open(options.output, say=say, progress=not options.quiet) as run:
        run.run("report", "compare")
        if options.json:
            _say(run.path("summary.json").read_text())


def _doctor(options: argparse.Namespace, command: str) -> int:
    from openmm_bg import cli_doctor

    return cli_doctor.run(options.json, _say)


def _systems(options: argparse.Namespace, command: str) -> None:
    from openmm_bg import systems

    if options.json:
        _say(json.dumps({name: systems.describe(name) for name in systems.names()}, indent=2))
        return
    width = max(map(len, systems.names()))
    for name in systems.names():
        _say(f"{name:{width}}  {systems.describe(name)}")
    _say('\nAny other peptide is named by its residues, caps first and last: openmm-bg run "ACE SER NME".')


def _say(line: str) -> None:
    print(line, flush=True)


def _hush(line: str) -> None:
    """A line that nobody asked for."""


if __name__ == "__main__":
    sys.exit(main())
