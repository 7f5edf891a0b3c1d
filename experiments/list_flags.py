"""Flags that hold several values, or fields of models. What is wrong with one is an absl error that names the flag, and
what there is to choose from, before anything is measured.

    define_counts("widths", [1, 2, 4], "of executables", flag_values=FLAGS)  # FLAGS.widths is a list of int

Counts and names are one at least; no numbers, or no fields, mean something.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

from absl import flags

from coalesce.models import by_name, NAMES

flags.disclaim_key_flags()  # those that are defined here are the caller's, whose --help lists them

Holder = flags.FlagHolder[Any]  # of a list
EVERYWHERE = ("dtype", "param_dtype", "parent", "name")  # fields of each network, that no flag sets


class Items(flags.ArgumentParser):
    """Values between commas, each read by itself. A value that has a comma stands in double quotes."""

    syntactic_help_string = "a comma separated list"

    def __init__(self, read: Callable[[str], Any], least: int) -> None:
        self._read, self._least = read, least

    def parse(self, argument: str | list[Any]) -> list[Any]:
        found = [self._read(str(item)) for item in flags.ListParser().parse(argument)]
        if len(found) < self._least:
            raise ValueError(f"nothing is given; {self._least} or more are wanted")
        return found

    def flag_type(self) -> str:
        return self.syntactic_help_string


class Serializer(flags.CsvListSerializer):
    """As it would be given: a number without what it does not need."""

    def serialize(self, value: Sequence[Any]) -> str:
        return super().serialize([f"{item:.12g}" if isinstance(item, float) else str(item) for item in value])


def define(
    read: Callable[[str], Any],
    name: str,
    default: Sequence[Any] | None,
    told: str,
    own: flags.FlagValues = flags.FLAGS,
    *,
    least: int = 0,
) -> Holder:
    """Of `least` values or more."""
    given = None if default is None else list(default)
    return flags.DEFINE(Items(read, least), name, given, told, flag_values=own, serializer=Serializer(","))


def define_counts(
    name: str,
    default: Sequence[int] | None,
    told: str,
    *,
    least: int = 1,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> Holder:
    return define(partial(count, least=least), name, default, told, flag_values, least=1)


def define_numbers(
    name: str,
    default: Sequence[float],
    told: str,
    *,
    good: Callable[[float], bool] = lambda x: x > 0,
    wanted: str = "above 0",
    flag_values: flags.FlagValues = flags.FLAGS,
) -> Holder:
    return define(partial(number, good=good, wanted=wanted), name, default, told, flag_values)


def define_names(
    name: str,
    default: Sequence[str] | None,
    told: str,
    known: Collection[str],
    *,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> Holder:
    return define(partial(one_of, known=known), name, default, told, flag_values, least=1)


def define_fields(
    name: str, default: Sequence[str], told: str, *, model: str = "model", flag_values: flags.FlagValues = flags.FLAGS
) -> Holder:
    """Of the model that another flag names, each as in `width=64`; `fields_of` reads them."""
    holder = define(field, name, default, told, flag_values)

    def fit(given: dict[str, Any]) -> bool:
        try:
            check_fields(given[model], fields_of(given[name]))
        except ValueError as e:
            raise flags.ValidationError(str(e)) from None
        return True

    flags.register_multi_flags_validator([model, name], fit, flag_values=flag_values)
    return holder


def define_fields_of_models(name: str, told: str, *, flag_values: flags.FlagValues = flags.FLAGS) -> Holder:
    """Of several models, each as in `lstm.steps=5`; `settings.named` reads them."""
    return define(field_of_model, name, [], told, flag_values)


def count(item: str, least: int = 1) -> int:
    if not item.isdecimal() or int(item) < least:
        raise ValueError(f"what is {item}? A number of at least {least} is wanted")
    return int(item)


def number(item: str, good: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(item)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not good(value):
        raise ValueError(f"what is {item}? A number {wanted} is wanted")
    return value


def one_of(item: str, known: Collection[str]) -> str:
    if item not in known:
        raise ValueError(f"what is {item}? There are {', '.join(known)}")
    return item


def field(item: str) -> str:
    """As it is; what it says is read where it is used."""
    name, _, value = item.partition("=")
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        name = ""
    if not name.isidentifier():
        raise ValueError(f"what is {item}? A field is set as in width=64")
    return item


def field_of_model(item: str) -> str:
    model, _, own = item.partition(".")
    try:
        check_fields(one_of(model, NAMES), fields_of([field(own)]))
    except ValueError as e:
        raise ValueError(f"{e}; of {item}, where a field of a model is set as in lstm.steps=5") from None
    return item


def fields_of(items: Iterable[str]) -> dict[str, Any]:
    """What such items say."""
    return {name: ast.literal_eval(value) for name, _, value in (item.partition("=") for item in items)}


def check_fields(model: str, fields: dict[str, Any]) -> None:
    """Raises ValueError if the model has not all of them."""
    try:
        if not fields.keys() & set(EVERYWHERE):
            by_name(model, **fields)
            return
    except TypeError:  # no field, or one that this model sets by itself
        pass
    known = [own.name for own in dataclasses.fields(network_of(model)) if own.name not in EVERYWHERE]
    raise ValueError(f"{model} has not all of {', '.join(fields)}; its fields are {', '.join(known)}")


def network_of(model: str) -> Any:
    return by_name(model).network
