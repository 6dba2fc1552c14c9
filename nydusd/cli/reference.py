"""Man pages, shell completions and the page about metrics, made from what they describe. Pure; used by `scripts/reference`.

The files are in the tree (man/, completions/, docs/metrics.md), for whoever packages it; a test says when they are stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from nydusd.cli import arguments, nydus_image, nydusctl
from nydusd.cli.reference_text import ABOUT, METRICS, SECTIONS, SUMMARY
from nydusd.control import metrics
from nydusd.version import BUILD_TIME, VERSION

_FILE_VALUES: Final = ("PATH", "FILE")


class Option(NamedTuple):
    """One option, or one positional argument (no flags)."""

    flags: tuple[str, ...]
    value: str
    """What its value is called; empty if it takes none."""
    choices: tuple[str, ...]
    help: str


class Command(NamedTuple):
    """A parser and what is below it."""

    name: str
    help: str
    options: tuple[Option, ...]
    commands: tuple[Command, ...]
    about: str


def commands() -> tuple[Command, ...]:
    """`nydusd`, `nydusctl` and `nydus-image`."""
    docs = {" ".join(verb.words): sys.modules[verb.run.__module__].__doc__ or "" for verb in nydusctl.VERBS}
    return (
        _command(arguments.parser(), "nydusd", "", {}),
        _command(nydusctl.parser(), "nydusctl", "", docs),
        _command(nydus_image.build_parser(), "nydus-image", "", {}),
    )


def files() -> dict[str, str]:
    """Path in the tree and text of each file."""
    out = {}
    for command in commands():
        out[f"man/{command.name}.8"] = man_page(command)
        out[f"completions/{command.name}.bash"] = bash(command)
        out[f"completions/_{command.name}"] = zsh(command)
    out["docs/metrics.md"] = metrics_page()
    return out


def metrics_page() -> str:
    """The page about the metrics: what is written by hand, then a table of all there are."""
    lines = [METRICS.strip(), "", "| name | type | unit | labels | what it is |", "| --- | --- | --- | --- | --- |"]
    for family in metrics.FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        name = f"`{family.name}`{' †' if family.kept else ''}"
        lines.append(f"| {name} | {family.kind} | {family.unit} | {labels} | {family.help} |")
    return "\n".join(lines) + "\n"


def _command(parser: argparse.ArgumentParser, name: str, text: str, docs: Mapping[str, str], path: str = "") -> Command:
    options: dict[tuple[str, ...], Option] = {}
    below: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for word, sub in action.choices.items():
                below.append(_command(sub, word, helps.get(word, ""), docs, f"{path} {word}".strip()))
        elif action.help is not argparse.SUPPRESS:
            flags = tuple(action.option_strings)
            takes_value = action.nargs != 0
            metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
            choices = tuple(str(choice) for choice in action.choices or ())
            options[flags or (action.dest,)] = Option(flags, metavar if takes_value else "", choices, action.help or "")
    return Command(name, text, tuple(options.values()), tuple(below), docs.get(path, ""))


# --- man pages ------------------------------------------------------------------------------------------------


def _roff(text: str) -> str:
    """Text as roff shows it, `code` in bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    parts = text.split("`")
    text = "".join(part if i % 2 == 0 else f"\\fB{part}\\fR" for i, part in enumerate(parts))
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.split("\n"))


def man_page(command: Command) -> str:
    """A page of section 8."""
    lines = [
        '.\\" Made by scripts/reference from the definition of the command line: do not edit.',
        f'.TH {command.name.upper()} 8 {BUILD_TIME[:10]} "nydusd {VERSION}" "System administration"',
        ".SH NAME",
        f"{command.name} \\- {_roff(SUMMARY[command.name])}",
        ".SH SYNOPSIS",
        *_synopsis(command),
        ".SH DESCRIPTION",
        *_paragraphs(ABOUT[command.name]),
        ".SH OPTIONS",
        *_options(command),
        ".SH COMMANDS",
        *_sub_pages(command, ""),
    ]
    for title, text in SECTIONS[command.name]:
        lines += [f".SH {title}", *_paragraphs(text)]
    return "\n".join(lines) + "\n"


def _synopsis(command: Command) -> Iterator[str]:
    yield f".B {command.name}"
    yield "[\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fICOMMAND OPTIONS\\fR]"


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(text.strip().split("\n\n")):
        if number:
            yield ".PP"
        yield _roff(paragraph.strip())


def _options(command: Command) -> Iterator[str]:
    for option in command.options:
        yield ".TP"
        names = ", ".join(f"\\fB{_roff(flag)}\\fR" for flag in option.flags) or f"\\fI{_roff(option.value)}\\fR"
        yield names + (f" \\fI{_roff(option.value)}\\fR" if option.value and option.flags else "")
        yield _roff(option.help)


def _sub_pages(command: Command, path: str) -> Iterator[str]:
    for sub in command.commands:
        name = f"{path} {sub.name}".strip()
        if sub.commands:
            yield from _sub_pages(sub, name)
            continue
        yield f".SS {_roff(name)}"
        yield _roff(sub.help[:1].upper() + sub.help[1:] + ("." if sub.help else ""))
        # The first paragraph of a verb's docstring says no more than its help.
        more = sub.about.strip().split("\n\n")[1:]
        if more:
            yield ".PP"
            yield from _paragraphs("\n\n".join(more))
        known = {option.flags for option in command.options}
        yield from _options(sub._replace(options=tuple(o for o in sub.options if o.flags not in known)))


# --- bash -----------------------------------------------------------------------------------------------------


def _walk(command: Command, path: str = "") -> Iterator[tuple[str, Command]]:
    yield path, command
    for sub in command.commands:
        yield from _walk(sub, f"{path}/{sub.name}")


def bash(command: Command) -> str:
    """A completion for bash, to be sourced or put into its completions folder."""
    name = command.name
    nodes = list(_walk(command))
    takes = sorted({flag for _, node in nodes for option in node.options if option.value for flag in option.flags})
    lines = [
        f"# bash completion for {name}; made by scripts/reference: do not edit.",
        f"_{name}() {{",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} path='' i word",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        word=${COMP_WORDS[i]}",
        "        case $word in",
        f"            {'|'.join(takes)}) ((i++)); continue ;;",
        "        esac",
        '        case "$path/$word" in',
        f"            {'|'.join(path for path, _ in nodes if path)}) path=$path/$word ;;",
        "        esac",
        "    done",
        '    case "$path $prev" in',
    ]
    for path, node in nodes:
        for option in node.options:
            if option.flags and option.value:
                pattern = "|".join(f'"{path} {flag}"' for flag in option.flags)
                lines.append(f"        {pattern}) {_bash_value(option)}; return ;;")
    lines += ["    esac", '    case "$path" in']
    for path, node in nodes:
        words = [flag for option in node.options for flag in option.flags] + [sub.name for sub in node.commands]
        words += [choice for option in node.options if not option.flags for choice in option.choices]
        lines.append(f"        '{path}') COMPREPLY=($(compgen -W '{' '.join(words)}' -- \"$cur\")) ;;")
    lines += ["    esac", "}", f"complete -F _{name} {name}"]
    return "\n".join(lines) + "\n"


def _bash_value(option: Option) -> str:
    if option.choices:
        return f"COMPREPLY=($(compgen -W '{' '.join(option.choices)}' -- \"$cur\"))"
    if option.value in _FILE_VALUES:
        return 'compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur"))'
    if option.value == "DIR":
        return 'compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur"))'
    return "COMPREPLY=()"


# --- zsh ------------------------------------------------------------------------------------------------------


def zsh(command: Command) -> str:
    """A completion for zsh, to be put into a folder of its $fpath."""
    lines = [f"#compdef {command.name}", "# Made by scripts/reference: do not edit.", ""]
    for path, node in reversed(list(_walk(command))):
        lines += _zsh_function(_zsh_name(command, path), node)
    lines.append(f'_{command.name} "$@"')
    return "\n".join(lines) + "\n"


def _zsh_name(command: Command, path: str) -> str:
    return f"_{command.name}{path.replace('/', '_').replace('-', '_')}"


def _zsh_function(name: str, node: Command) -> Iterator[str]:
    yield f"{name}() {{"
    if node.commands:
        yield "    local context state state_descr line"
        yield "    typeset -A opt_args"
    yield "    _arguments -C \\"
    for option in node.options:
        yield f"        {_zsh_option(option)} \\"
    if not node.commands:
        yield "        && return 0"
        yield "}"
        yield ""
        return
    yield "        '1: :->command' '*:: :->rest' && return 0"
    yield "    case $state in"
    yield "        command)"
    yield "            local -a commands=("
    for sub in node.commands:
        yield f"                '{sub.name}:{_zsh_text(sub.help)}'"
    yield "            )"
    yield "            _describe -t commands command commands ;;"
    yield "        rest)"
    yield "            case $line[1] in"
    for sub in node.commands:
        yield f"                {sub.name}) {name}_{sub.name.replace('-', '_')} ;;"
    yield "            esac ;;"
    yield "    esac"
    yield "}"
    yield ""


def _zsh_text(text: str) -> str:
    for letter in "\\[]:":
        text = text.replace(letter, "\\" + letter)
    return text.replace("'", "'\\''")


def _zsh_option(option: Option) -> str:
    if not option.flags:
        return f"'::{option.value}:({' '.join(option.choices)})'" if option.choices else f"'::{option.value}:'"
    value = ""
    if option.value:
        action = f"({' '.join(option.choices)})" if option.choices else "_files" if option.value in _FILE_VALUES else ""
        value = f":{option.value}:{'_files -/' if option.value == 'DIR' else action}"
    text = f"[{_zsh_text(option.help)}]{value}"
    if len(option.flags) == 1:
        return f"'{option.flags[0]}{text}'"
    return f"'({' '.join(option.flags)})'{{{','.join(option.flags)}}}'{text}'"
