"""The settings page: what is safe to set from a page, and what can only be seen there.

Folders are set on the command line, since a page names no paths. Tokens go in and never come out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from detour import UserError, files
from detour.web.access import Access
from detour.web.context import Context, context
from detour.web.login import Done, access
from detour.web.pages import page

if TYPE_CHECKING:
    from starlette.responses import Response

router = APIRouter()


class Settings(BaseModel):
    """As they are. Of tokens only whether there is one."""

    folder: str
    comfyui: str | None
    """None: not said on the command line."""
    hub_token: bool
    """Whether jobs get a token of the Hugging Face hub from here."""
    renewable: bool
    """Whether the server's own token can be renewed from a page: not where it comes from the environment."""


class HubToken(BaseModel):
    """A token of the Hugging Face hub."""

    model_config = ConfigDict(extra="forbid")
    token: Annotated[str, Field(max_length=500)]


@router.get("/settings", include_in_schema=False)
def settings_page(
    request: Request, context: Annotated[Context, Depends(context)], access: Annotated[Access, Depends(access)]
) -> Response:
    """The page."""
    return page(request, "settings.html", settings=read(context, access))


@router.get("/api/settings")
def read(context: Annotated[Context, Depends(context)], access: Annotated[Access, Depends(access)]) -> Settings:
    """What is set."""
    return Settings(
        folder=str(context.folder),
        comfyui=str(context.comfyui) if context.comfyui else None,
        hub_token=context.store.hub_token.is_file(),
        renewable=access.file is not None,
    )


@router.put("/api/settings/hub-token")
def set_hub_token(given: HubToken, context: Annotated[Context, Depends(context)]) -> Done:
    """Keep a token for jobs that start from now on. It cannot be read back."""
    token = given.token.strip()
    if not (token.isascii() and token.isprintable() and " " not in token and len(token) >= 8):
        raise UserError("this does not look like a token of the hub: they begin with hf_ and hold letters and digits")
    context.store.check_there()
    files.write_bytes(context.store.hub_token, token + "\n", private=True)
    return Done()


@router.delete("/api/settings/hub-token")
def remove_hub_token(context: Annotated[Context, Depends(context)]) -> Done:
    """Forget it. Jobs that start from now on have the environment's, if there is one."""
    context.store.check_there()
    context.store.hub_token.unlink(missing_ok=True)
    return Done()
