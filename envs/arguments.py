"""Arguments of environments, which come from configurations and may be of any type: checked, and refused by their names.

Every refusal is an `ArgumentError`, in one line that starts with the argument's name. Use `require` for arguments of our own, and
`built_with` around somebody else's constructor, which knows best what it takes.
"""

import difflib
import importlib
import numbers
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
DEFAULT = "leave it out for the default"  # the way out of most mistakes


class ArgumentError(ValueError):
    """An environment does not take an argument: "name: found X; allowed Y; way out"."""


def refuse(name: str, found: object, allowed: str, way_out: str = DEFAULT) -> NoReturn:
    """Raises the `ArgumentError` of an argument."""
    raise ArgumentError(f"{name}: found {found!r}; allowed {allowed}; {way_out}")


def require(name: str, value: object, holds: bool, allowed: str, way_out: str = DEFAULT) -> None:
    """Refuses an argument unless something `holds`, which `allowed` says in words."""
    if not holds:
        refuse(name, value, allowed, way_out)


def require_integer(name: str, value: object, low: int, high: int | None = None, way_out: str = DEFAULT) -> None:
    """Refuses an argument unless it is an integer in [low, high]; `high` None is no bound."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    require(name, value, is_integer(value, low, high), allowed, way_out)


def require_number(name: str, value: object, low: float, high: float, way_out: str = DEFAULT) -> None:
    """Refuses an argument unless it is an integer or a float in [low, high]."""
    require(name, value, is_number(value, low, high), f"a number from {low:g} to {high:g}", way_out)


def require_flag(name: str, value: object) -> None:
    """Refuses an argument that is neither true nor false: any text would pass for true."""
    require(name, value, isinstance(value, bool), "true or false")


def is_integer(value: object, low: int, high: int | None = None) -> bool:
    """Whether it is an integer, of Python or NumPy, in [low, high], and not a bool; `high` None is no bound."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return int(value) >= low and (high is None or int(value) <= high)


def is_number(value: object, low: float, high: float) -> bool:
    """Whether it is a real number, of Python or NumPy, in [low, high], and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= float(value) <= high


def import_named(text: str) -> tuple[ModuleType, str]:
    """The module of "package.module:name", imported, and the name.

    Raises:
        ValueError: if there is no such module; one that is there and lacks one of its own imports tells so itself.
    """
    module_name, _, name = text.partition(":")
    if not module_name or module_name.startswith("."):  # relative to what?
        raise ValueError(
            f"{text}: found the module name {module_name!r}; allowed a full one, as in package.module:Name; write it out"
        )
    try:
        return importlib.import_module(module_name), name
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{text}: there is no module {module_name!r}; is its folder on PYTHONPATH?") from error


def callable_of(module: ModuleType, name: str) -> Callable[..., Any]:
    """A class or function of a module.

    Raises:
        ValueError: if it has none of this name; names the nearest.
    """
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        nearest = difflib.get_close_matches(name, public, n=1, cutoff=0.0)
        hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
        raise ValueError(f"{module.__name__}:{name}: module {module.__name__!r} has no {name!r}{hint}")
    found = getattr(module, name)
    if not callable(found):
        raise ValueError(f"{module.__name__}:{name}: expected a class or a function, got {type(found).__name__}")
    return found


def built_with(build: Callable[..., T], arguments: Mapping[str, Any], owner: str) -> T:
    """What `build` makes of the arguments; where one of them is why it cannot, the error says which.

    That is the first one with which it cannot be built any more, when they are added one by one to none at all.

    Args:
        build: somebody else's constructor. Called again, with fewer arguments, only after it has failed.
        arguments: by name.
        owner: whose arguments they are.

    Raises:
        ArgumentError: if an argument is to blame.
        Exception: what `build` raised, if it cannot be built without any argument either.
    """
    try:
        return build(**arguments)
    except ArgumentError:
        raise
    except Exception:
        accepted: dict[str, Any] = {}
        if _failure(build, accepted) is not None:
            raise
        for name, value in arguments.items():
            accepted[name] = value
            error = _failure(build, accepted)
            if error is not None:
                message = " ".join(str(error).split())
                reason = type(error).__name__ + (f": {message}" if message else "")
                raise ArgumentError(
                    f"{name}: found {value!r}; allowed what {owner} takes ({reason}); {DEFAULT}"
                ) from error
        raise


def _failure(build: Callable[..., Any], arguments: Mapping[str, Any]) -> Exception | None:
    """What goes wrong with these arguments, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they came with the first attempt
        try:
            build(**arguments).close()
        except Exception as error:
            return error
    return None
