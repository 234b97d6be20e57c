"""`detour ui`: from its options to the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detour.jobs.store import default_folder
from detour.web.server import Options, serve

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


def ui(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Serve until Ctrl-C; `say` prints a line at once."""
    options = Options(
        host=arguments.host,
        port=arguments.port,
        folder=arguments.folder or default_folder(),
        token_file=arguments.token_file,
        allow_hosts=arguments.allow_host,
        comfyui=arguments.comfyui,
        browser=not arguments.no_browser,
    )
    return serve(options, say)
