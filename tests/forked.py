"""Runs many commands `python script.py ...` for the price of one start of TensorFlow: each in a fork of this process.

    python tests/forked.py < commands.json > results.json
    python tests/forked.py --serve    # a command a line of the input, a result a line of the output, one at a time

A command is a `Command`, a result [exit code, standard output, standard error]. Forking is safe as long as no operation
of TensorFlow ran: its threads start with the first one, and the children would wait for them for ever.
"""

import json
import os
import resource
import runpy
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from absl import flags

ROOT = Path(__file__).parent.parent
AT_ONCE = 2
KILLED = -signal.SIGALRM  # the exit code of a command that takes longer


@dataclass(frozen=True)
class Command:
    """A script with its arguments, started at the repository's root; what is None in `environment` is taken out of it.

    `fresh` gives it an interpreter of its own, for an environment that matters at import.
    """

    arguments: list[str]
    environment: dict[str, str | None]
    file_size_limit: int | None = None
    fresh: bool = False
    seconds: int = 1200  # until it is killed, as one that hangs


def results(commands: list[Command]) -> list[tuple[int, str, str]]:
    """Run the commands; return exit code, standard output and standard error of each."""
    import_all()
    waiting, running, codes = list(range(len(commands))), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder) / f"{number}.{stream}" for stream in (1, 2)] for number in waiting]
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                number = waiting.pop(0)
                running[start(commands[number], outputs[number])] = number
            process, status = os.wait()
            codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
        return [(codes[number], *(path.read_text() for path in both)) for number, both in enumerate(outputs)]


def serve() -> None:
    """Run one command after the other, as they come."""
    import_all()
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / stream for stream in "12"]
            _, status = os.waitpid(start(Command(**json.loads(line)), outputs), 0)
            print(json.dumps([os.waitstatus_to_exitcode(status), *(path.read_text() for path in outputs)]), flush=True)


def import_all() -> None:
    """Import what the scripts import, but leave absl's flags as they are when a script starts."""
    import large_batch.backend  # noqa: F401, I001

    import sklearn.datasets  # noqa: F401
    from tensorflow.python.eager import context

    import large_batch.claims  # noqa: F401
    import large_batch.experiment  # noqa: F401
    import network_zoo  # noqa: F401

    assert not context.context()._initialized, "an import runs an operation of TensorFlow"

    # TensorFlow defines flags of its own, which a script does not know yet when it reads its command line.
    names = list(flags.FLAGS)
    late = {flags.FLAGS[name] for name in names}  # some have two names
    for name in names:
        delattr(flags.FLAGS, name)
    parse = flags.FlagValues.__call__

    def parse_then_define(values: flags.FlagValues, arguments: list[str]) -> list[str]:
        rest = parse(values, arguments)
        for flag in late:
            values[flag.name] = flag
        return rest

    flags.FlagValues.__call__ = parse_then_define


def start(command: Command, outputs: list[Path]) -> int:
    """Start a command with its standard output and standard error in two files; return the process."""
    if process := os.fork():
        return process
    code = 1
    try:
        signal.alarm(command.seconds)  # survives an exec, and needs no help from Python to kill
        for descriptor, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, value in command.environment.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        if command.file_size_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (command.file_size_limit,) * 2)
        if command.fresh:
            os.execv(sys.executable, [sys.executable, *command.arguments])
        sys.argv = list(command.arguments)
        code = exit_code(command.arguments[0])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def exit_code(script: str) -> int:
    """Run a script as Python runs it from the command line; return its exit code."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        json.dump(results([Command(**command) for command in json.load(sys.stdin)]), sys.stdout)
