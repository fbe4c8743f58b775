"""The two ways a command ends early without a traceback (see `cli.run`)."""


class UserError(ValueError):
    """A request that cannot be met as asked; the message is one sentence with the remedy (exit code 2)."""


class MachineError(RuntimeError):
    """A machine that failed a sound request: no source answers, a full disk, a diverging training (exit code 1)."""
