"""CEL with Kubernetes' functions."""

from typing import Any

import pytest

from vmnet.lab.apiserver.cel import CompileError, EvaluationError, Expression, parse_quantity


def value(source: str, self: Any = None) -> Any:
    return Expression(source).evaluate({"self": self})


@pytest.mark.parametrize(
    "source",
    [
        "isIP('192.0.2.1') && isIP('fd00::1') && !isIP('300.1.1.1') && !isIP('01.2.3.4') && !isIP('::ffff:1.2.3.4')",
        "ip('fd00::0:1') == ip('fd00::1') && string(ip('fd00::0:1')) == 'fd00::1'",
        "ip('192.0.2.1').family() == 4 && ip('fd00::1').family() == 6",
        "ip('127.0.0.1').isLoopback() && ip('fe80::1').isLinkLocalUnicast() && ip('192.0.2.1').isGlobalUnicast()",
        "ip('0.0.0.0').isUnspecified() && ip('224.0.0.1').isLinkLocalMulticast()",
        "ip.isCanonical('fd00::1') && !ip.isCanonical('fd00::0:1')",
        "isCIDR('10.0.0.0/8') && isCIDR('10.1.2.3/8') && !isCIDR('10.0.0.0') && !isCIDR('10.0.0.0/255.0.0.0')",
        "cidr('10.0.0.0/8').containsIP('10.1.2.3') && !cidr('10.0.0.0/8').containsIP('fd00::1')",
        "cidr('10.0.0.0/8').containsIP(ip('10.1.2.3')) && cidr('10.0.0.0/8').containsCIDR(cidr('10.1.0.0/16'))",
        "cidr('10.1.2.3/8').masked() == cidr('10.0.0.0/8') && cidr('10.1.2.3/8') != cidr('10.0.0.0/8')",
        "cidr('10.1.2.3/8').ip() == ip('10.1.2.3') && cidr('fd00::/64').prefixLength() == 64",
        "isURL('https://a.example.test:80/x') && !isURL('x y') && url('https://a.example.test:80/x').getPort() == '80'",
        "url('https://u@a.example.test/x?k=1&k=2').getHost() == 'a.example.test'",
        "url('/p?k=1&k=2').getQuery()['k'] == ['1', '2'] && url('/p').getEscapedPath() == '/p'",
        "quantity('1Gi').isGreaterThan(quantity('1G')) && quantity('100m').compareTo(quantity('0.1')) == 0",
        "quantity('2k').asInteger() == 2000 && quantity('1').add(quantity('500m')) == quantity('1.5')",
        "isQuantity('10Mi') && !isQuantity('ten') && quantity('-1').sign() == -1 && !quantity('100m').isInteger()",
        "'a,b,c'.split(',') == ['a', 'b', 'c'] && ['a', 'b'].join('-') == 'a-b' && 'aa'.replace('a', 'b') == 'bb'",
        "'ABC'.lowerAscii() == 'abc' && ' x '.trim() == 'x' && 'abc'.substring(1, 2) == 'b' && 'abc'.charAt(1) == 'b'",
        "'x12y3'.find('[0-9]+') == '12' && 'x12y3'.findAll('[0-9]+') == ['12', '3'] && 'q'.find('[0-9]') == ''",
        "'abc'.indexOf('c') == 2 && [1, 2, 1].indexOf(1) == 0 && [1, 2, 1].lastIndexOf(1) == 2",
        "[1, 2, 3].sum() == 6 && [1, 3, 2].max() == 3 && [3, 1].min() == 1 && [1, 2].isSorted() && ![2, 1].isSorted()",
        "'%s has %d'.format(['x', 3]) == 'x has 3'",
        "optional.of(1).hasValue() && !optional.none().hasValue()",
        "{'a': {'b': 1}}.?a.b.orValue(0) == 1 && {'a': {}}.?a.?b.orValue(7) == 7 && {'a': 1}.?z.orValue(2) == 2",
        "[5][?0].orValue(0) == 5 && [5][?1].orValue(9) == 9",
        "[3, 4].all(i, v, v == i + 3) && {'a': 1}.exists(k, v, k == 'a' && v == 1)",
        "[3, 4].exists_one(i, v, i == 1 && v == 4) && [3, 4].transformList(i, v, i * v) == [0, 4]",
        "[3, 4].transformList(i, v, i > 0, v) == [4] && {'a': 1}.transformMap(k, v, v + 1) == {'a': 2}",
        "cel.bind(x, 3, x * x) == 9",
        "sets.contains([1, 2], [1]) && math.greatest(1, 2) == 2",
        "[1, 2].map(x, x > 1, x * 2) == [4] && size('abc') == 3 && type(1) == int && 'a' in ['a']",
    ],
)
def test_true(source: str) -> None:
    assert value(source) is True


def test_variables_of_comprehensions_are_not_fields() -> None:
    items = [{"v": 1, "name": "v"}]
    assert value("self.all(i, v, v.v == 1 && v.name == 'v')", items) is True


def test_strings_and_comments_are_left_alone() -> None:
    assert value("self == 'a.?b // [?' // end", "a.?b // [?") is True


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "self.size() > nothing",
            "ERROR: <input>:1:15: undeclared reference to 'nothing' (in container '')\n"
            " | self.size() > nothing\n | ..............^",
        ),
        ("foo(self)", "undeclared reference to 'foo'"),
        ("self ==", "ERROR: <input>:1:"),
        ("self.all(x, y)", "undeclared reference to 'y'"),
        ("self.?a == (", "Syntax error"),
    ],
)
def test_compile_errors(source: str, message: str) -> None:
    with pytest.raises(CompileError) as error:
        Expression(source)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "self", "message"),
    [
        ("self.a == 1", {}, "no such key: a"),
        ("self + 1", "x", "no such overload"),
        ("self[3]", [1], "index out of bounds: 3"),
        ("ip(self).family()", "x", 'IP Address "x" parse error'),
        ("1 / self", 0, "division by zero"),
    ],
)
def test_evaluation_errors(source: str, self: Any, message: str) -> None:
    with pytest.raises(EvaluationError) as error:
        value(source, self)
    assert message in str(error.value)


def test_uses() -> None:
    assert Expression("self == oldSelf").uses("oldSelf")
    assert not Expression("self == 'oldSelf'").uses("oldSelf")


@pytest.mark.parametrize("text", ["", "1 Gi", "1KiB", ".", "e3"])
def test_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="quantities"):
        parse_quantity(text)
