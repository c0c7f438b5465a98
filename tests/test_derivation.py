"""docs/derivation.md: its numbers against mpmath and against the package, and its links against the files."""

from __future__ import annotations

import ast
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import mpmath
import numpy as np
import pytest

from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry
from gpu_bp.backends import Backend
from gpu_bp.schedule import constant

PAGE = Path(__file__).parents[1] / "docs/derivation.md"
TEXT = PAGE.read_text(encoding="utf-8")
TOLERANCE = 1e-12  # relative
DIGITS = 50

Numbers = dict[str, mpmath.mpf]


# The page: its section "By hand" -----------------------------------------------------------------------------

BY_HAND = TEXT.split("\n## By hand\n")[1].split("\n## ")[0]


def table(block: str) -> dict[str, dict[str, str]]:
    """A table's cells by column and symbol, a symbol being the first cell without its dollars and braces."""
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    symbols = [re.sub(r"[$\\{}]", "", line[0]).removeprefix("partial E/partial ") for line in lines]
    cells = {name: [line[k] for line in lines] for k, name in enumerate(header)}
    return {name: dict(zip(symbols, column, strict=True)) for name, column in cells.items()}


def numbers(column: dict[str, str]) -> Numbers:
    """A column's numbers, exactly as printed."""
    with mpmath.workdps(DIGITS):
        return {symbol: mpmath.mpf(cell) for symbol, cell in column.items()}


SIGNALS, GRADIENTS, UPDATE = (table(block) for block in BY_HAND.split("\n\n") if block.startswith("|"))
ROWS = [numbers(SIGNALS["row 1"]), numbers(SIGNALS["row 2"])]
GIVEN = ("x_1", "x_2", "d")
BEFORE = numbers(UPDATE["before"])
PARAMETERS = ("w_11", "w_12", "b_1", "w_21", "w_22", "b_2", "w_31", "w_32", "b_3")
RATE = float(Fraction(re.findall(r"\\eta = ([\d/]+)", BY_HAND)[0]))

# By the rows of the batch.
GRADIENT = {
    (0,): numbers(GRADIENTS["row 1"]),
    (1,): numbers(GRADIENTS["row 2"]),
    (0, 1): numbers(GRADIENTS["sum"]),
}
AFTER = {(0,): numbers(UPDATE["after row 1"]), (0, 1): numbers(UPDATE["after both rows"])}


def agree(found: Numbers, page: Numbers) -> None:
    """The same symbols, and the same numbers to the tolerance."""
    assert found.keys() == page.keys()
    for symbol, number in found.items():
        assert abs(number - page[symbol]) <= TOLERANCE * abs(page[symbol]), (symbol, number, page[symbol])


def evaluate(formula: str, names: Numbers) -> mpmath.mpf:
    """The value of a formula of the tables."""
    text = formula.strip("$").replace(r"\delta", "delta")
    text = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"(mpf(\1) / \2)", text)
    text = re.sub(r"e\^\{(.+?)\}", r"exp(\1)", text).replace("^", "**")
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", text)  # what stands side by side is multiplied
    return eval(text, {"__builtins__": {}, "mpf": mpmath.mpf, "exp": mpmath.exp}, names)


# The same numbers from the definitions of v, y and E alone ---------------------------------------------------


def forward(parameters: Numbers, row: int, moved: Numbers) -> Numbers:
    """v, y and E of a row; `moved` is added to the quantities that it names, for derivatives by them."""
    found: Numbers = {}

    def put(symbol: str, value: mpmath.mpf) -> mpmath.mpf:
        found[symbol] = value + moved.get(symbol, 0)
        return found[symbol]

    def neuron(j: int, left: mpmath.mpf, right: mpmath.mpf) -> mpmath.mpf:
        net_input = parameters[f"w_{j}1"] * left + parameters[f"w_{j}2"] * right + parameters[f"b_{j}"]
        return put(f"y_{j}", 1 / (1 + mpmath.exp(-put(f"v_{j}", net_input))))

    x_1, x_2, d = (ROWS[row][symbol] for symbol in GIVEN)
    put("E", (d - neuron(3, neuron(1, x_1, x_2), neuron(2, x_1, x_2))) ** 2 / 2)
    return found


def signals(row: int) -> Numbers:
    """v, y, E, e = dE/dy and delta = dE/dv of a row."""
    found = forward(BEFORE, row, {})
    for j in (1, 2, 3):
        for symbol, by in (("e", f"y_{j}"), ("delta", f"v_{j}")):
            found[f"{symbol}_{j}"] = mpmath.diff(lambda h, by=by: forward(BEFORE, row, {by: h})["E"], 0)
    return found


def gradient(rows: tuple[int, ...]) -> Numbers:
    """dE/dw of each parameter, E summed over the rows."""

    def loss(name: str, w: mpmath.mpf) -> mpmath.mpf:
        return sum(forward({**BEFORE, name: w}, row, {})["E"] for row in rows)

    return {name: mpmath.diff(partial(loss, name), w) for name, w in BEFORE.items()}


@pytest.mark.parametrize("row", [0, 1])
def test_page_agrees_with_derivatives(row: int) -> None:
    with mpmath.workdps(DIGITS):
        agree(signals(row), {symbol: number for symbol, number in ROWS[row].items() if symbol not in GIVEN})


@pytest.mark.parametrize("rows", GRADIENT)
def test_page_agrees_with_derivatives_by_parameters(rows: tuple[int, ...]) -> None:
    with mpmath.workdps(DIGITS):
        agree(gradient(rows), GRADIENT[rows])


@pytest.mark.parametrize("rows", AFTER)
def test_page_agrees_with_update(rows: tuple[int, ...]) -> None:
    with mpmath.workdps(DIGITS):
        agree({name: BEFORE[name] - RATE / len(rows) * g for name, g in gradient(rows).items()}, AFTER[rows])


@pytest.mark.parametrize("row", [0, 1])
def test_formulas_of_page(row: int) -> None:
    """The second column, in the numbers of the others."""
    with mpmath.workdps(DIGITS):
        for column, page in ((SIGNALS[""], ROWS[row]), (GRADIENTS[""], GRADIENT[(row,)])):
            formulas = {symbol: formula for symbol, formula in column.items() if formula != "given"}
            found = {symbol: evaluate(formula, ROWS[row]) for symbol, formula in formulas.items()}
            agree(found, {symbol: page[symbol] for symbol in found})


def test_page_prints_enough_digits() -> None:
    """At least 12 significant ones, but for what is exact with fewer."""
    exact = {*GIVEN, "v_1", "v_2"}
    columns = [SIGNALS["row 1"], SIGNALS["row 2"], GRADIENTS["row 1"], GRADIENTS["row 2"], GRADIENTS["sum"]]
    for column in [*columns, UPDATE["after row 1"], UPDATE["after both rows"]]:
        for symbol, cell in column.items():
            assert symbol in exact or len(cell.lstrip("-0.").replace(".", "")) >= 12, (symbol, cell)


# The package -------------------------------------------------------------------------------------------------


def by_parameter(tensors: dict[str, np.ndarray]) -> Numbers:
    """Named arrays of the package, as the page names their elements."""
    hidden, b = tensors["layers.0.weights"], tensors["layers.0.biases"]
    values = [*hidden[0], b[0], *hidden[1], b[1], *tensors["layers.1.weights"][0], *tensors["layers.1.biases"]]
    return {name: mpmath.mpf(float(value)) for name, value in zip(PARAMETERS, values, strict=True)}


@pytest.fixture
def network(backend: Backend) -> Network:
    """The network of the page, with the parameters printed there."""
    w = {name: float(value) for name, value in BEFORE.items()}
    made = Network([2, 2, 1], ["logistic", "logistic"], backend=backend, dtype="float64")
    made.load(
        {
            "layers.0.weights": np.array([[w["w_11"], w["w_12"]], [w["w_21"], w["w_22"]]]),
            "layers.0.biases": np.array([w["b_1"], w["b_2"]]),
            "layers.1.weights": np.array([[w["w_31"], w["w_32"]]]),
            "layers.1.biases": np.array([w["b_3"]]),
        }
    )
    return made


@pytest.mark.parametrize("rows", GRADIENT)
@pytest.mark.parametrize("keep_net_inputs", [True, False])
def test_package_agrees_with_page(network: Network, rows: tuple[int, ...], keep_net_inputs: bool) -> None:
    backend = network.backend
    given = np.array([[float(ROWS[row][symbol]) for symbol in GIVEN] for row in rows])
    inputs, targets = backend.to_device(given[:, :2]), backend.to_device(given[:, 2:])
    batch = Batch(inputs, targets, backend.to_device(np.array(rows, np.int64)))
    objective = Objective(network, registry.loss("squared_error"), len(rows), keep_net_inputs=keep_net_inputs)
    Step(objective, Optimizer(registry.update("sgd"), network, constant(RATE)))(batch)

    compared = {"v": "net_input", "y": "output", "delta": "delta"}
    if not keep_net_inputs:
        del compared["v"]  # the output stands in its place
        assert all(signal.net_input is signal.output for signal in objective.signals)
    for symbol, attribute in compared.items():
        hidden, output = (backend.to_host(getattr(signal, attribute)) for signal in objective.signals)
        for r, row in enumerate(rows):
            found = {f"{symbol}_{j}": float(value) for j, value in enumerate([*hidden[r], *output[r]], start=1)}
            agree(found, {name: ROWS[row][name] for name in found})
    agree({"mean": objective.mean_loss()}, {"mean": sum(ROWS[row]["E"] for row in rows) / len(rows)})
    agree(by_parameter(network.layout.views(backend.to_host(objective.gradients))), GRADIENT[rows])
    if rows in AFTER:
        agree(by_parameter(network.tensors()), AFTER[rows])


# The links ---------------------------------------------------------------------------------------------------

LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def defined(path: Path) -> set[str]:
    """What a Python file defines: functions, classes, `Class.member`, and names that are assigned."""

    def names(body: list[ast.stmt], prefix: str) -> set[str]:
        found: set[str] = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    found |= names(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        return found

    return names(ast.parse(path.read_text(encoding="utf-8")).body, "")


def test_links() -> None:
    links = LINK.findall(TEXT)
    assert len(links) > 20
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in TEXT.splitlines() if line.startswith("#")}
    for name, target in links:
        if target.startswith("#"):
            assert target[1:] in headings, target
            continue
        path = PAGE.parent / target
        assert path.is_file(), target
        assert name[0] == name[-1] == "`", name
        assert name.strip("`") in defined(path), f"{name} is not in {target}"


def test_numbered_equations() -> None:
    """They count from 1, a link follows each, and what the text refers to is there."""
    blocks = TEXT.split("\n\n")
    numbered = [k for k, block in enumerate(blocks) if r"\tag" in block]
    numbers = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", TEXT)]
    assert numbers == list(range(1, len(numbered) + 1))
    for k in numbered:
        assert LINK.match(blocks[k + 1]), blocks[k]
    prose = re.sub(r"\$[^$]*\$", "", re.sub(r"\$\$.*?\$\$", "", TEXT, flags=re.DOTALL))
    assert {int(number) for number in re.findall(r"\((\d+)\)", prose)} <= set(numbers)
