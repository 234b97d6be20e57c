"""Detour trains LoRAs for distilled ("turbo") diffusion models without losing their few-step speed."""

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can put right: the message says what, where, what is allowed and what to do.

    The command line prints it without a traceback and ends with `exit_code` (docs: cli exit codes).
    """

    exit_code = 2


class RefusedError(UserError):
    """The job is well formed but was refused before it started (plan, dataset health, disk space)."""

    exit_code = 3
