"""What may stand where fairseq evaluates a text: literals and arithmetic, as Python computes them, and nothing else."""

import ast
import random

import pytest

from kd_ext.files.literals import NotALiteral, evaluate

USED = ["[(512, 3)] * 20", "((32, 3, 2, 2, False),) * 2", "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2"]
USED += ["(0.9, 0.98)", "[1e-30, 1e-3]", "True", "False", "None", "0.1", "[1, 2, 3]", "{'name': 'x', 'p': [1, -2.5]}"]
USED += ["1/3", "2**-1", "2 ** 10", "-5 // 2", "7 % 3", "not 1", "'a' * 3", "'a' + 'b'", "[0] * -1", "(1,)", "()", " 1"]
USED += [
    "{1, 2}",
    "1_000",
    "0x10",
    "1e400",
    "[True] * 2",
    "'it\\'s'",
    "b'a'",
    "1\n",
    "[\n1,\n2]",
    "(-8) ** 0.5",
    "1j * 1j",
]


@pytest.mark.parametrize("text", USED)
def test_as_python(text):
    expected = eval(text.strip())  # the oracle
    found = evaluate(text)
    assert found == expected
    assert type(found) is type(expected)


REFUSED = ["x", "x.y", "f()", "f(1)", "[x for x in [1]]", "(lambda: 1)", "f'{1}'", "1 if 1 else 2", "1 and 2", "1 < 2"]
REFUSED += [
    "{**{}}",
    "[*[1]]",
    "...",
    "x[0]",
    "[1][0]",
    "1; 2",
    "import os",
    "x = 1",
    "(x := 1)",
    "1 << 9",
    "1 | 2",
    "~1",
]
REFUSED += [
    "",
    " ",
    "\0",
    "(",
    "'",
    "\ud800",
    "{[]: 1}",
    "1 // 0",
    "0 ** -1",
    "'%d' % 1",
    "-'a'",
    "[1] + (1,)",
    "await x",
]
REFUSED += ["9**9**9", "2**10001", "10**3000 * 10**3000", "'a' * 10**9", "[0] * 10**9", "10**9 * (0,)", "9.0**9**9"]
REFUSED += [
    "[[[[0] * 1000] * 1000] * 1000] * 1000",
    "((0,) * 50000) + ((0,) * 50001)",
    "float('inf')",
    "__debug__.real",
]
REFUSED += [
    "1+" * 4999 + "1",
    "-" * 9999 + "1",
    "(" * 9999,
    "[" * 5000 + "]" * 5000,
    "a" + ".a" * 4999,
    "f" + "()" * 4999,
]
REFUSED += ["not " * 2400 + "1", "lambda:" * 1400 + "1", "1 if 1 else " * 800 + "1", "1+" * 10**5 + "1", "1" * 9999]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: ascii(text[:20]))
def test_nothing_else(text):
    with pytest.raises(NotALiteral) as raised:
        evaluate(text)
    assert "\n" not in str(raised.value)


def test_lines_of_data_may_be_long():
    text = str({"audio": "a-b/c_1.wav", "units": " ".join(map(str, range(20000))), "lengths": list(range(20000))})
    assert evaluate(text) == ast.literal_eval(text)


def test_random_arithmetic():
    """On what Python computes, the two agree; what is refused is too large, or an error there as well."""
    rng = random.Random(0)

    def expression(depth):
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(["0", "1", "2", "3.5", "-4", "True", "'ab'", "[1, 2]", "(3,)", "None"])
        operation = rng.choice(["+", "-", "*", "/", "//", "%", "**"])
        return f"({expression(depth - 1)} {operation} {expression(depth - 1)})"

    agreed = 0
    for _ in range(3000):
        text = expression(3)
        try:
            found = evaluate(text)
        except NotALiteral:
            continue
        assert repr(found) == repr(eval(text))
        agreed += 1
    assert agreed > 300
