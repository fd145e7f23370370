"""Options described once, as fields of a dataclass.

A field made with `option` says which values it takes, what it means, what its published flag is
called and whether a run that goes on may differ in it. Flags (`add_flags`), entries of YAML files
(`read_entries`), values from either (`build`), run records (`entries`) and the resume rule
(`free`) all come from there. Fields that are such dataclasses themselves are laid flat.

A field's name is the house's spelling of the flag. A published flag of another name is listed
first in --help, and is the name under which runs are recorded. Words joined by hyphens are taken
with underscores, too.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from utils.errors import UserError, listing
from utils.kinds import Kind, boolean, path, text

Settings = TypeVar('Settings')
_KEY = 'option'
_SHOWN = 60  # characters of a wrong value


class Option(NamedTuple):
    """What `option` was told; flag: the published name, where it is not the field's."""

    kind: Kind
    help: str
    group: str
    metavar: str | None
    flag: str | None
    free: bool
    also: tuple[str, ...]
    bare: Any
    alone: bool


def option(
    default: Any = dataclasses.MISSING,
    kind: Kind = text,
    help: str = '',
    *,
    group: str = 'options',
    metavar: str | None = None,
    flag: str | None = None,
    free: bool = False,
    also: Sequence[str] = (),
    bare: Any = None,
    alone: bool = False,
) -> Any:
    """A dataclass field that is an option.

    default: None where nothing may be given; without one the option is required. help: for
    --help, with units. group: heading in --help. metavar: what stands for the value; without one
    a boolean is a switch (--x where it is False, --x and --no-x else). flag: its published name.
    free: a run that goes on may differ in it. also: further spellings, with their dashes. bare:
    the value of a flag that is given without one. alone: the field's name is no flag, as it says
    too little beside those of others.
    """
    about = {_KEY: Option(kind, help, group, metavar, flag, free, tuple(also), bare, alone)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def described(kind: type) -> Iterator[tuple[dataclasses.Field, Option]]:
    """The options of a dataclass, those of its dataclass fields in their place."""
    for f in dataclasses.fields(kind):
        if _KEY in f.metadata:
            yield f, f.metadata[_KEY]
        elif dataclasses.is_dataclass(f.type):
            yield from described(f.type)  # type: ignore[arg-type]


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def recorded_name(f: dataclasses.Field, about: Option) -> str:
    """The published flag without its dashes, which is also the flag's `dest`."""
    return (about.flag or f.name).replace('-', '_')


def add_flags(
    parser: argparse._ActionsContainer,
    kind: type,
    *,
    names: Sequence[str] | None = None,
    details: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    **changes: Any,
) -> None:
    """Adds a flag for every option of a dataclass to a parser, under the headings of their
    groups, or to one such group.

    names: only these fields. details: what argparse is told of single fields, where that is known
    only now, such as choices. changes: the same of all, default=None for flags that override a
    file.
    """
    for f, about in described(kind):
        if names is not None and f.name not in names:
            continue
        group: argparse._ActionsContainer = parser
        if isinstance(parser, argparse.ArgumentParser):
            group = heading(parser, about.group)
        told = {**_details(f, about), **details.get(f.name, {}), **changes}
        group.add_argument(*spellings(f, about), **told)


def heading(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of a parser with that heading, a new one where there is none yet."""
    found = [g for g in parser._action_groups if g.title == title]
    return found[0] if found else parser.add_argument_group(title)


def flag_name(kind: type, field: str) -> str:
    """What parsed flags call the field of a dataclass."""
    return next(recorded_name(f, about) for f, about in described(kind) if f.name == field)


def spellings(f: dataclasses.Field, about: Option) -> list[str]:
    """The flags of an option: short ones, the published one, the house's, others."""
    short = [flag for flag in about.also if not flag.startswith('--')]
    names = [about.flag or f.name, recorded_name(f, about), *([] if about.alone else [f.name])]
    return list(dict.fromkeys((*short, *(f'--{n}' for n in names), *about.also)))


def _details(f: dataclasses.Field, about: Option) -> dict[str, Any]:
    """What argparse wants to know of an option."""
    default, one = _default(f), about.kind.item or about.kind
    details: dict[str, Any] = {'help': about.help, 'dest': recorded_name(f, about)}
    if one is boolean and about.metavar is None:
        action = 'store_true' if default is False else argparse.BooleanOptionalAction
        return {**details, 'action': action, 'default': default}
    if default is dataclasses.MISSING:
        details['required'] = True
    else:
        details['default'] = default
    if one.choices:
        details['choices'] = one.choices  # named as users know them; `build` makes the values
    else:
        details |= {'type': one, 'metavar': about.metavar}
    if about.kind.item:
        details['nargs'] = about.kind.length or '+'
    if about.bare is not None:
        details |= {'nargs': '?', 'const': about.bare}
    return details


def build(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The settings that parsed flags, recorded options or entries give; others are passed over.

    values: by published flag or by field. Missing ones, and lists that are empty, are the default.
    """
    found: dict[str, Any] = {}
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        about = f.metadata.get(_KEY)
        if about is None:
            if dataclasses.is_dataclass(f.type):
                found[f.name] = build(f.type, values)  # type: ignore[type-var, arg-type]
            continue
        for name in (recorded_name(f, about), f.name):
            if name in values:
                value = values[name]
                found[f.name] = None if value is None else about.kind.of(value)
    return kind(**found)


def entries(settings: Any, *, recorded: bool = False) -> dict[str, Any]:
    """All options, flat, as YAML and JSON hold them; by field, or as runs are recorded."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        about, value = f.metadata.get(_KEY), getattr(settings, f.name)
        if about is not None:
            name = recorded_name(f, about) if recorded else f.name
            found[name] = None if value is None else about.kind.show(value)
        elif dataclasses.is_dataclass(f.type):
            found |= entries(value, recorded=recorded)
    return found


def free(kind: type) -> tuple[str, ...]:
    """Options in which a run that goes on may differ, as they are recorded."""
    return tuple(recorded_name(f, about) for f, about in described(kind) if about.free)


def paths(kind: type) -> tuple[str, ...]:
    """Options that are files or folders, as they are recorded."""
    return tuple(recorded_name(f, about) for f, about in described(kind) if about.kind is path)


def faults(settings: Any) -> list[str]:
    """What is wrong with the values of a dataclass that was made in Python, a line for each."""
    found = []
    for f in dataclasses.fields(settings):
        about = f.metadata.get(_KEY)
        if about is not None and (fault := _fault(f, about, getattr(settings, f.name))):
            found.append(f'`{f.name}`: {fault}')
    return found


def check(settings: Any) -> None:
    """UserError with everything that `faults` finds."""
    if found := faults(settings):
        raise UserError('; '.join(found))


def _fault(f: dataclasses.Field, about: Option, value: Any) -> str | None:
    if value is None and f.default is None or value == () == f.default:
        return None
    try:
        about.kind.value(value)
    except (ValueError, TypeError):
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]} ...'
        return f'want {about.kind.wanted}, not {shown}'
    return None


def read_entries(kind: type[Settings], given: Mapping[str, Any], source: str) -> Settings:
    """The settings of a YAML file's entries; UserError listing all missing, unknown, wrong ones."""
    known = {f.name: (f, about) for f, about in described(kind)}
    wrong = [
        f'missing: {n}'
        for n, (f, _) in known.items()
        if n not in given and f.default is f.default_factory is dataclasses.MISSING
    ]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            wrong.append(f'unknown: {name}' + (f' (did you mean {near[0]}?)' if near else ''))
    wrong += [
        f'{n}: {fault}'
        for n, (f, about) in known.items()
        if n in given and (fault := _fault(f, about, given[n]))
    ]
    if wrong:
        raise UserError(listing(source, wrong))
    return build(
        kind, {n: known[n][1].kind.value(v) if v is not None else None for n, v in given.items()}
    )
