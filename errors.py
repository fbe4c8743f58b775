"""The ways in which work ends early (see `cli.run`)."""


class UserError(ValueError):
    """A request that cannot be met as asked; the message is one sentence with the remedy (exit code 2)."""


class MachineError(RuntimeError):
    """A machine that failed a sound request: no source answers, a full disk, a diverging training (exit code 1)."""


class BusyError(RuntimeError):
    """Another process is doing just this; the message says which."""


class Interrupted(KeyboardInterrupt):  # noqa: N818, after its parent
    """SIGINT or SIGTERM, noticed where everything is kept; the message says how to continue (exit code 130 or 143)."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum
