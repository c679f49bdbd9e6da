"""What a model that is elsewhere is called, where nobody has said it: as its own server calls it."""

from __future__ import annotations

import msgspec

from headrace.types import ModelFiles

TIMEOUT = 5.0
"""Seconds; a server that is away is asked again by the engine, which says what is wrong."""
LONGEST = 200
"""Characters of a name that is taken over."""
SHOWN = 5


def named_by_upstream(files: ModelFiles, api_key: str | None) -> ModelFiles:
    """The remote model with the one name that its upstream lists; unchanged where that doesn't answer, and with a note for the operator
    where it lists several. The name that it had goes on to mean it."""
    names = _listed(files.url, api_key)
    if len(names) == 1 and names[0] != files.name and len(names[0]) <= LONGEST and names[0].isprintable():
        return msgspec.structs.replace(files, aliases=(names[0],))
    if len(names) > 1:
        shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
        note = (
            f"{files.url} has {len(names)} models ({shown}). Requests go to the first, {names[0]}, which is served as {files.name!r}; "
            "remote_model (HEADRACE_REMOTE_MODEL, or ?model=NAME behind the URL) chooses another, and the name."
        )
        return msgspec.structs.replace(files, notes=(*files.notes, note))
    return files


def _listed(url: str, api_key: str | None) -> list[str]:
    import httpx

    try:
        answer = httpx.get(f"{url}/models", headers={"authorization": f"Bearer {api_key}"} if api_key else {}, timeout=TIMEOUT)
        listed = answer.json()["data"] if answer.status_code == 200 else []
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return []
    if not isinstance(listed, list):
        return []
    return [model["id"] for model in listed if isinstance(model, dict) and isinstance(model.get("id"), str) and model["id"]]
