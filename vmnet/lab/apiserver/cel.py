"""CEL rules of CustomResourceDefinitions, with the function library that Kubernetes adds.

The language is ``common-expression-language``'s; what its parser lacks is rewritten to calls before it sees the text:
optional selection (``a.?b``, ``a[?0]``), comprehensions with two variables and ``cel.bind``. Addresses, subnets,
quantities and URLs are maps with one marker key, because a value must cross into the library and back.
"""

import functools
import ipaddress
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import cel as library
from cel import stdlib

_TOKEN: Final = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
    |(?P<string>[rRbB]{0,2}(?:\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'))
    |(?P<number>0[xX][0-9a-fA-F]+[uU]?|\d+\.\d+(?:[eE][+-]?\d+)?|\d+(?:[eE][+-]?\d+)?[uU]?)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<operator>\.\?|\[\?|&&|\|\||[=!<>]=|.)""",
    re.VERBOSE | re.DOTALL,
)
_OPENING: Final = {"(": ")", "[": "]", "{": "}"}
_MACROS: Final = frozenset({"all", "exists", "exists_one", "existsOne", "map", "filter", "transformList"})
_TWO_VARIABLES: Final = frozenset({"all", "exists", "exists_one", "existsOne"})
_BUILTIN_NAMES: Final = frozenset(
    {
        *("true", "false", "null", "in", "int", "uint", "double", "bool", "string", "bytes", "list", "map", "type"),
        *("null_type", "timestamp", "duration", "google", "optional", "math", "strings", "sets", "base64", "lists"),
        *("cel", "quantity", "url", "ip", "cidr", "format"),
    }
)
# What the language itself brings; its operators do not look like names.
_NATIVE: Final = frozenset(
    {
        *("all", "exists", "exists_one", "map", "filter", "has", "size", "contains", "startsWith", "endsWith"),
        *("matches", "int", "uint", "double", "string", "bytes", "bool", "timestamp", "duration", "dyn", "type"),
        *("of", "none", "ofNonZeroValue", "hasValue", "value", "orValue", "or", "optMap", "optFlatMap"),
        *("getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getHours"),
        *("getMinutes", "getSeconds", "getMilliseconds"),
    }
)


class CompileError(Exception):
    """The expression is wrong; the message is worded as an API server's, with the place."""


class EvaluationError(Exception):
    """The expression failed on this value; the message is short, as ``no such key: name``."""


class _Token:
    __slots__ = ("kind", "position", "text")

    def __init__(self, kind: str, text: str, position: int) -> None:
        self.kind, self.text, self.position = kind, text, position


def _tokens(source: str) -> list[_Token]:
    found = []
    for match in _TOKEN.finditer(source):
        kind = match.lastgroup or ""
        if kind != "space":
            found.append(_Token(kind, match.group(), match.start()))
    return found


def _closing(tokens: Sequence[_Token], opening: int) -> int:
    """Index of the bracket that closes the one at ``opening``; the end when it is never closed."""
    depth = 0
    for index in range(opening, len(tokens)):
        text = tokens[index].text
        if tokens[index].kind == "operator":
            if text in _OPENING or text == "[?":
                depth += 1
            elif text in ")]}":
                depth -= 1
                if depth == 0:
                    return index
    return len(tokens)


def _arguments(tokens: Sequence[_Token]) -> list[list[_Token]]:
    """The tokens between two brackets, split at their top-level commas."""
    found: list[list[_Token]] = [[]]
    depth = 0
    for token in tokens:
        if token.kind == "operator":
            if token.text in _OPENING or token.text == "[?":
                depth += 1
            elif token.text in ")]}":
                depth -= 1
            elif token.text == "," and depth == 0:
                found.append([])
                continue
        found[-1].append(token)
    return found


def _renamed(tokens: Sequence[_Token], names: Mapping[str, str]) -> list[_Token]:
    found: list[_Token] = []
    for token in tokens:
        selected = bool(found) and found[-1].text in (".", ".?")
        if token.kind == "name" and not selected and token.text in names:
            found += [_Token(item.kind, item.text, token.position) for item in _tokens(names[token.text])]
        else:
            found.append(token)
    return found


def _single_name(argument: Sequence[_Token]) -> str:
    return argument[0].text if len(argument) == 1 and argument[0].kind == "name" else ""


def _rewritten(tokens: Sequence[_Token]) -> str:
    """CEL that the library parses, with the same meaning."""
    parts: list[str] = []
    index, optional = 0, False
    while index < len(tokens):
        token = tokens[index]
        after = tokens[index + 1] if index + 1 < len(tokens) else None
        if token.text == ".?" and after is not None:
            parts.append(f'.optionalField("{after.text}")')
            index, optional = index + 2, True
            continue
        if token.text == "[?":
            closing = _closing(tokens, index)
            parts.append(f".optionalIndex({_rewritten(tokens[index + 1 : closing])})")
            index, optional = closing + 1, True
            continue
        if token.text == "." and after is not None:
            call = index + 2 < len(tokens) and tokens[index + 2].text == "("
            if optional and not call:
                parts.append(f'.optionalField("{after.text}")')
                index += 2
                continue
            optional = False
            if call:
                closing = _closing(tokens, index + 2)
                inside = _arguments(tokens[index + 3 : closing])
                bound = bool(parts) and parts[-1].strip() == "cel" and after.text == "bind" and len(inside) == 3
                if bound:
                    parts[-1] = ""
                    name, value, body = inside
                    parts.append(f"[{_rewritten(value)}].map({_single_name(name)}, {_rewritten(body)})[0]")
                else:
                    parts.append(_call(after.text, inside))
                index = closing + 1
                continue
        elif token.kind == "operator" and token.text not in "[]":
            optional = False
        parts.append(token.text if token.kind == "operator" and token.text in ".()[]{}," else f" {token.text} ")
        index += 1
    return "".join(parts)


def _call(name: str, inside: list[list[_Token]]) -> str:
    pair = (_single_name(inside[0]), _single_name(inside[1])) if len(inside) >= 3 else ("", "")
    wanted = 4 if name in ("transformList", "transformMap", "transformMapEntry") else 3
    two_variables = name in (*_MACROS, "transformMap") and all(pair) and len(inside) in (3, wanted)
    if name == "map" and len(inside) == 3:
        two_variables = False
    if not two_variables:
        return f".{name}({', '.join(_rewritten(item) for item in inside)})"
    entry = f"{pair[0]}_and_{pair[1]}"
    names = {pair[0]: f"{entry}.k", pair[1]: f"{entry}.v"}
    bodies = [_rewritten(_renamed(item, names)) for item in inside[2:]]
    if name == "transformList":
        return f".entries().map({entry}, {', '.join(bodies)})"
    if name == "transformMap":
        *conditions, body = bodies
        pairs = f'{{"k": {entry}.k, "v": {body}}}'
        return f".entries().map({entry}, {', '.join([*conditions, pairs])}).fromEntries()"
    plain = "exists_one" if name == "existsOne" else name
    return f".entries().{plain}({entry}, {bodies[0]})"


# Kubernetes' functions. Values with a type of their own are maps with one marker key.

_IP: Final = "ip.kubernetes"
_CIDR: Final = "cidr.kubernetes"
_QUANTITY: Final = "quantity.kubernetes"
_URL: Final = "url.kubernetes"
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def _parse_ip(text: Any) -> _Address:
    if isinstance(text, Mapping) and _IP in text:
        text = text[_IP]
    if not isinstance(text, str) or "%" in text:
        raise ValueError(f"IP Address {text!r} parse error during conversion from string")
    try:
        found = ipaddress.ip_address(text)
    except ValueError as error:
        raise ValueError(f'IP Address "{text}" parse error during conversion from string: {error}') from None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        raise ValueError(f'IPv4-mapped IPv6 address "{text}" is not allowed')
    return found


def _parse_cidr(text: Any) -> _Interface:
    if isinstance(text, Mapping) and _CIDR in text:
        text = text[_CIDR]
    if not isinstance(text, str):
        raise ValueError(f"network address {text!r} parse error during conversion from string")
    _, slash, bits = text.partition("/")
    if not slash or not bits.isdigit() or (len(bits) > 1 and bits[0] == "0") or "%" in text:
        raise ValueError(f'network address parse error during conversion from string: network address "{text}"')
    try:
        found = ipaddress.ip_interface(text)
    except ValueError as error:
        raise ValueError(f"network address parse error during conversion from string: {error}") from None
    if isinstance(found, ipaddress.IPv6Interface) and found.ip.ipv4_mapped is not None:
        raise ValueError(f'IPv4-mapped IPv6 address "{text}" is not allowed')
    return found


def _parses(parse: Callable[[Any], object], value: Any) -> bool:
    try:
        parse(value)
    except ValueError:
        return False
    return isinstance(value, str)


def _ip(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping) and _CIDR in value:
        return {_IP: str(_parse_cidr(value).ip)}
    return {_IP: str(_parse_ip(value))}


def _cidr(value: Any) -> dict[str, str]:
    return {_CIDR: _parse_cidr(value).with_prefixlen}


def _is_canonical(value: str) -> bool:
    return str(_parse_ip(value)) == value


def _contains_ip(network: Any, address: Any) -> bool:
    subnet, found = _parse_cidr(network).network, _parse_ip(address)
    return subnet.version == found.version and found in subnet


def _contains_cidr(network: Any, other: Any) -> bool:
    outer, inner = _parse_cidr(network).network, _parse_cidr(other).network
    if isinstance(outer, ipaddress.IPv4Network) and isinstance(inner, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(outer, ipaddress.IPv6Network) and isinstance(inner, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False


_SUFFIXES: Final[dict[str, Decimal]] = {
    **{name: Decimal(1024) ** power for power, name in enumerate(("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
    **{name: Decimal(10) ** power for name, power in (("n", -9), ("u", -6), ("m", -3), ("k", 3), ("M", 6), ("G", 9))},
    **{name: Decimal(10) ** power for name, power in (("T", 12), ("P", 15), ("E", 18))},
}
_QUANTITY_FORM: Final = re.compile(r"^([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:([eE][+-]?\d+)|([KMGTPE]i|[numkMGTPE]?))$")


def parse_quantity(value: Any) -> Decimal:
    """A resource quantity (``100m``, ``1.5Gi``, ``1e3``) as a number. Raises ValueError."""
    if isinstance(value, Mapping) and _QUANTITY in value:
        return Decimal(value[_QUANTITY])
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    match = _QUANTITY_FORM.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")
    number, exponent, suffix = match.groups()
    try:
        return Decimal(number + (exponent or "")) * _SUFFIXES[suffix or ""]
    except InvalidOperation as error:
        raise ValueError(f"{value!r} is no quantity") from error


def _quantity(value: Any) -> dict[str, str]:
    number = parse_quantity(value).normalize()
    return {_QUANTITY: format(number, "f")}


def _compare(left: Any, right: Any) -> int:
    first, second = parse_quantity(left), parse_quantity(right)
    return (first > second) - (first < second)


def _as_integer(value: Any) -> int:
    number = parse_quantity(value)
    if number != number.to_integral_value():
        raise ValueError("cannot convert value to integer")
    return int(number)


def _url(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping) and _URL in value:
        value = value[_URL]
    parts = urllib.parse.urlsplit(value) if isinstance(value, str) else None
    if parts is None or not (value.startswith("/") or (parts.scheme and (parts.netloc or parts.path))):
        raise ValueError(f"URL parse error during conversion from string: {value!r}: invalid URI for request")
    parts.port  # noqa: B018 — raises ValueError for a port that is no number
    return {_URL: value}


def _url_part(part: Callable[[urllib.parse.SplitResult], Any]) -> Callable[[Any], Any]:
    return lambda value: part(urllib.parse.urlsplit(_url(value)[_URL]))


def _text(value: Any) -> str:
    """``string()`` of the values that the language does not know."""
    if isinstance(value, Mapping):
        for marker in (_IP, _CIDR, _QUANTITY, _URL):
            if marker in value:
                return str(value[marker])
    raise TypeError("no such overload: string")


def _pattern(text: str) -> re.Pattern[str]:
    from vmnet.lab.apiserver.schema import go_pattern

    return go_pattern(text)


def _find(text: str, pattern: str) -> str:
    match = _pattern(pattern).search(text)
    return match.group() if match else ""


def _find_all(text: str, pattern: str, limit: int = -1) -> list[str]:
    found = [match.group() for match in _pattern(pattern).finditer(text)]
    return found if limit < 0 else found[:limit]


def _is_sorted(items: Sequence[Any]) -> bool:
    return all(items[index] <= items[index + 1] for index in range(len(items) - 1))


def _index_of(where: Any, what: Any, offset: int = 0) -> int:
    if isinstance(where, str):
        return where.find(what, offset)
    return next((index for index, item in enumerate(where) if item == what), -1)


def _last_index_of(where: Any, what: Any, offset: int | None = None) -> int:
    if isinstance(where, str):
        return where.rfind(what) if offset is None else where.rfind(what, 0, offset + len(what))
    return max((index for index, item in enumerate(where) if item == what), default=-1)


def _total(items: Sequence[Any]) -> Any:
    return functools.reduce(lambda left, right: left + right, items) if items else 0


def _field(value: Any, name: Any) -> Any:
    if isinstance(value, library.OptionalValue):
        if not value.has_value():
            return value
        value = value.value()
    if isinstance(value, Mapping):
        return library.OptionalValue.of(value[name]) if name in value else library.OptionalValue.none()
    if isinstance(value, list | tuple) and isinstance(name, int):
        return library.OptionalValue.of(value[name]) if 0 <= name < len(value) else library.OptionalValue.none()
    raise TypeError("no such overload")


def _entries(value: Any) -> list[dict[str, Any]]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [{"k": key, "v": item} for key, item in pairs]


def _from_entries(items: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
    return {item["k"]: item["v"] for item in items}


def _format(template: str, values: Sequence[Any]) -> str:
    remaining = iter(values)

    def shown(value: Any) -> str:
        match value:
            case bool():
                return "true" if value else "false"
            case None:
                return "null"
            case float():
                return format(value, "g")
            case list() | tuple():
                return f"[{', '.join(shown(item) for item in value)}]"
            case dict():
                return f"{{{', '.join(f'{shown(key)}: {shown(item)}' for key, item in sorted(value.items()))}}}"
        return str(value)

    def one(match: re.Match[str]) -> str:
        verb, precision = match[2], match[1]
        if verb == "%":
            return "%"
        value = next(remaining)
        if verb in "sd":
            return shown(value)
        digits = int(precision[1:]) if precision else 6
        return format(value, {"x": "x", "X": "X", "b": "b", "o": "o"}.get(verb) or f".{digits}{verb}")

    return re.sub(r"%(\.\d+)?([sdfexXbo%])", one, template)


_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_QUALIFIED: Final = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]")


def _named_format(name: str) -> Any:
    checks: dict[str, Callable[[str], bool]] = {
        "dns1123Label": lambda text: bool(_LABEL.fullmatch(text)),
        "dns1123Subdomain": lambda text: len(text) <= 253 and all(_LABEL.fullmatch(part) for part in text.split(".")),
        "labelValue": lambda text: not text or bool(_QUALIFIED.fullmatch(text)),
    }
    return library.OptionalValue.of({"format.kubernetes": name}) if name in checks else library.OptionalValue.none()


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "isIP": lambda value: _parses(_parse_ip, value),
    "ip": _ip,
    "ip.isCanonical": _is_canonical,
    "isCanonical": lambda *values: _is_canonical(values[-1]),
    "family": lambda value: _parse_ip(value).version,
    "isUnspecified": lambda value: _parse_ip(value).is_unspecified,
    "isLoopback": lambda value: _parse_ip(value).is_loopback,
    "isLinkLocalMulticast": lambda value: (
        _parse_ip(value) in ipaddress.ip_network("224.0.0.0/24" if _parse_ip(value).version == 4 else "ff02::/16")
    ),
    "isLinkLocalUnicast": lambda value: _parse_ip(value).is_link_local,
    "isGlobalUnicast": lambda value: (
        not (
            _parse_ip(value).is_unspecified
            or _parse_ip(value).is_loopback
            or _parse_ip(value).is_multicast
            or _parse_ip(value).is_link_local
            or str(_parse_ip(value)) == "255.255.255.255"
        )
    ),
    "isCIDR": lambda value: _parses(_parse_cidr, value),
    "cidr": _cidr,
    "containsIP": _contains_ip,
    "containsCIDR": _contains_cidr,
    "masked": lambda value: {_CIDR: str(_parse_cidr(value).network)},
    "prefixLength": lambda value: _parse_cidr(value).network.prefixlen,
    "isQuantity": lambda value: _parses(parse_quantity, value),
    "quantity": _quantity,
    "isInteger": lambda value: parse_quantity(value) == parse_quantity(value).to_integral_value(),
    "asInteger": _as_integer,
    "asApproximateFloat": lambda value: float(parse_quantity(value)),
    "sign": lambda value: (parse_quantity(value) > 0) - (parse_quantity(value) < 0),
    "isGreaterThan": lambda left, right: _compare(left, right) > 0,
    "isLessThan": lambda left, right: _compare(left, right) < 0,
    "compareTo": _compare,
    "add": lambda left, right: {_QUANTITY: format(parse_quantity(left) + parse_quantity(right), "f")},
    "sub": lambda left, right: {_QUANTITY: format(parse_quantity(left) - parse_quantity(right), "f")},
    "isURL": lambda value: _parses(_url, value),
    "url": _url,
    "getScheme": _url_part(lambda url: url.scheme),
    "getHost": _url_part(lambda url: url.netloc.rpartition("@")[2]),
    "getHostname": _url_part(lambda url: url.hostname or ""),
    "getPort": _url_part(lambda url: str(url.port) if url.port is not None else ""),
    "getEscapedPath": _url_part(lambda url: url.path),
    "getQuery": _url_part(lambda url: urllib.parse.parse_qs(url.query)),
    "string": _text,
    "find": _find,
    "findAll": _find_all,
    "isSorted": _is_sorted,
    "sum": _total,
    "min": lambda *items: min(items[0] if len(items) == 1 else items),
    "max": lambda *items: max(items[0] if len(items) == 1 else items),
    "indexOf": _index_of,
    "lastIndexOf": _last_index_of,
    "format": _format,
    "named": lambda *values: _named_format(values[-1]),
    "optionalField": _field,
    "optionalIndex": _field,
    "entries": _entries,
    "fromEntries": _from_entries,
}


@functools.cache
def _standard() -> dict[str, Callable[..., Any]]:
    context = library.Context()
    stdlib.add_stdlib_to_context(context)
    found: dict[str, Callable[..., Any]] = dict(context.functions)
    found.update(_FUNCTIONS)
    return found


def _place(source: str, position: int, message: str) -> str:
    line = source.count("\n", 0, position) + 1
    column = position - (source.rfind("\n", 0, position) + 1)
    text = source.split("\n")[line - 1]
    return f"ERROR: <input>:{line}:{column + 1}: {message}\n | {text}\n | {'.' * column}^"


def _bound(tokens: Sequence[_Token]) -> set[str]:
    """Names that comprehensions and ``cel.bind`` introduce."""
    found: set[str] = set()
    for index, token in enumerate(tokens[:-2]):
        if (
            token.kind == "name"
            and (token.text in _MACROS or token.text in ("bind", "optMap", "optFlatMap", "transformMap"))
            and tokens[index + 1].text == "("
        ):
            arguments = _arguments(tokens[index + 2 : _closing(tokens, index + 1)])
            both = token.text.startswith("transform") or (len(arguments) == 3 and token.text in _TWO_VARIABLES)
            found.update(name for item in arguments[: 2 if both else 1] if (name := _single_name(item)))
    return found


class Expression:
    """One compiled expression. ``variables`` are the names it may use beside the language's own."""

    __slots__ = ("_functions", "_names", "_program", "source")

    def __init__(self, source: str, variables: frozenset[str] = frozenset({"self", "oldSelf"})) -> None:
        """Compile ``source``. Raises CompileError."""
        self.source = source
        tokens = _tokens(source)
        text = _rewritten(tokens) if _needs_rewriting(tokens) else source
        try:
            self._program = library.compile(text)
        except (ValueError, RuntimeError) as error:
            found = str(error)
            start = found.find("ERROR: ")
            if text != source or start < 0:
                raise CompileError(_place(source, 0, f"Syntax error: {found.splitlines()[0]}")) from error
            raise CompileError(found[start:].replace("\n| ", "\n | ")) from error
        self._check(tokens, variables)
        used = self._program.references()
        standard = _standard()
        self._functions = {
            name: call
            for name, call in standard.items()
            if name in used["functions"] or "." in name or name == "string"
        }
        self._names = frozenset(used["variables"])

    def _check(self, tokens: Sequence[_Token], variables: frozenset[str]) -> None:
        allowed = variables | _bound(tokens) | _BUILTIN_NAMES
        standard = _standard()
        mistakes: list[_Token] = []
        for index, token in enumerate(tokens):
            before = tokens[index - 1].text if index else ""
            after = tokens[index + 1].text if index + 1 < len(tokens) else ""
            if token.kind != "name":
                continue
            if after == "(":
                known = token.text in standard or token.text in _NATIVE or token.text in _MACROS
                known = known or token.text in ("bind", "transformMap", "existsOne")
                known = known or any(name.endswith(f".{token.text}") for name in standard)
                if not known and not (before == "." and index > 1 and tokens[index - 2].text in ("math", "sets")):
                    mistakes.append(token)
            elif before not in (".", ".?") and token.text not in allowed:
                mistakes.append(token)
        if mistakes:
            raise CompileError(
                "\n".join(
                    _place(self.source, token.position, f"undeclared reference to '{token.text}' (in container '')")
                    for token in mistakes
                )
            )

    def uses(self, name: str) -> bool:
        """Whether it refers to a variable."""
        return name in self._names

    def evaluate(self, variables: Mapping[str, Any]) -> Any:
        """The value for these variables (as ``schema`` converts them). Raises EvaluationError."""
        context = library.Context(dict(variables), self._functions)
        try:
            return self._program.execute(context)
        except KeyError as error:
            raise EvaluationError(f"no such key: {error.args[0] if error.args else error}") from error
        except TypeError as error:
            raise EvaluationError("no such overload") from error
        except (ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise EvaluationError(_brief(str(error))) from error


def _needs_rewriting(tokens: Sequence[_Token]) -> bool:
    for index, token in enumerate(tokens):
        if token.text in (".?", "[?"):
            return True
        if token.kind == "name" and index and tokens[index - 1].text == "." and index + 1 < len(tokens):
            if tokens[index + 1].text != "(":
                continue
            if token.text in ("bind", "transformList", "transformMap", "existsOne"):
                return True
            if token.text in ("all", "exists", "exists_one"):
                inside = _arguments(tokens[index + 2 : _closing(tokens, index + 1)])
                if len(inside) == 3:
                    return True
    return False


def _brief(message: str) -> str:
    return re.sub(r"^Function '\w+' error: Python function call failed: \w+: ", "", message).removesuffix(
        ". Check function arguments and their types."
    )


@functools.lru_cache(maxsize=4096)
def compiled(source: str, variables: frozenset[str] = frozenset({"self", "oldSelf"})) -> Expression:
    """``Expression``, kept: versions of a definition share most of their rules. Raises CompileError."""
    return Expression(source, variables)
