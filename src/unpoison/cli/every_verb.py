"""Options that every verb has without naming them: `--config` and `--offline`."""

from __future__ import annotations

import difflib
import os
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from unpoison.errors import ConfigError

__all__ = ["add_options"]

_LARGEST_FILE = 2**20
_PANEL = "How it runs"
_TRUE = ("1", "ON", "YES", "TRUE")  # of a variable of the hub's own library, whose reading this is


def add_options(command: Any) -> None:
    """Give a verb, or each verb of a group, the options of this module."""
    if hasattr(command, "commands"):
        for each in command.commands.values():
            add_options(each)
        return
    command.params += typer.main.get_command(_app).params


def _read(ctx: typer.Context, path: Path | None) -> None:
    if path is not None:
        ctx.default_map = _settings(path, ctx)


def _block(wanted: bool) -> None:
    if wanted or os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        _stay_offline()


_app = typer.Typer(add_completion=False)


@_app.command()
def _options(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Options from a file; those on the command line win.",
            is_eager=True,
            expose_value=False,
            callback=_read,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="Use no network; HF_HUB_OFFLINE=1 in the environment says the same.",
            is_eager=True,
            expose_value=False,
            callback=_block,
            rich_help_panel=_PANEL,
        ),
    ] = False,
) -> None:
    """Never run; whoever adds its options runs."""


def _settings(path: Path, ctx: Any) -> dict[str, Any]:
    """Values for the verb of a context, by the parser's own names.

    A file may serve several verbs: `[scan]` and `[attack.patch]` hold what is for them alone.
    """
    contexts = [ctx]  # from the verb to the program
    while contexts[-1].parent is not None:
        contexts.append(contexts[-1].parent)
    groups = [(outer, inner.info_name) for outer, inner in zip(contexts[1:], contexts, strict=False)][::-1]
    verb, command = " ".join(name for _, name in groups), ctx.command
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file; expected TOML with options, such as alpha = 0.05")
    if path.stat().st_size > _LARGEST_FILE:
        raise ConfigError(
            f"--config {path}: has more than {_LARGEST_FILE // 2**20} MiB; expected a few options"
        )
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: no TOML: {str(error).splitlines()[0]}") from error
    given = {key: value for key, value in value.items() if not isinstance(value, dict)}
    for group, part in groups:
        verbs = group.command.list_commands(group)
        for name, entry in value.items():
            if isinstance(entry, dict) and name not in verbs:
                raise ConfigError(f"--config {path}: [{name}] is no verb; expected one of {', '.join(verbs)}")
        value = value.get(part, {})
        if not isinstance(value, dict):
            raise ConfigError(
                f"--config {path}: {part} is a verb; expected a table [{verb.replace(' ', '.')}]"
            )
    given |= {key: entry for key, entry in value.items() if not isinstance(entry, dict)}

    known = {parameter.name: parameter for parameter in command.params if parameter.expose_value}
    spelled = {name.replace("_", "-"): parameter for name, parameter in known.items() if name}
    for parameter in known.values():
        spelled |= {option.lstrip("-"): parameter for option in parameter.opts}
    settings: dict[str, Any] = {}
    for key, entry in given.items():
        parameter = spelled.get(key.replace("_", "-"))
        if parameter is None:
            near = difflib.get_close_matches(key.replace("_", "-"), spelled, n=1)
            raise ConfigError(
                f"--config {path}: unpoison {verb} has no option {key!r}"
                + (f"; did you mean {near[0]}?" if near else f"; see unpoison {verb} --help")
            )
        several = parameter.multiple or parameter.nargs != 1
        if isinstance(entry, list) != several or not isinstance(entry, list | str | bool | int | float):
            raise ConfigError(
                f"--config {path}: {key} = {entry!r}: expected {'a list' if several else 'one value'}"
            )
        settings[parameter.name] = entry
    return settings


def _stay_offline() -> None:
    """Nothing that this process does from now on reaches the network; what is cached still loads.

    The hub's libraries are told, so that they say it in their own words; whatever else tries meets a closed door.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError("--offline: no network is used")

    socket.getaddrinfo = refuse
    local = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None):
            refuse()
        local(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign, assignment]
