"""The typed schema of the `[data]` table: one section for each kind of data."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from gpu_bp.config_choice import named
from gpu_bp.config_types import MOST_LAYERS, Count, Positive, Rows, Section, Width
from gpu_bp.errors import nearest, short

SCALINGS = ("none", "standardise", "max-abs")


def _scaling(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str) and value not in SCALINGS:
        raise ValueError(f"unknown {short(value)}; {nearest(value, SCALINGS)}, or a number that divides the inputs")
    if not isinstance(value, str) and not (number and 0 < value < math.inf):
        raise ValueError(
            f"must be {', '.join(SCALINGS)}, or a number above 0 that divides the inputs, not {short(value)}"
        )
    return value


Scaling = Annotated[Literal["none", "standardise", "max-abs"] | Positive, BeforeValidator(_scaling)]
Distribution = Literal["normal", "uniform"]
TrainRows = Annotated[int, Field(ge=1, le=10**15, description="training rows")]
# Numbers whose squares float32 can hold.
Length = Annotated[float, Field(gt=0, le=1e15)]
Offset = Annotated[float, Field(ge=-1e15, le=1e15)]
Noise = Annotated[float, Field(ge=0, le=1e15, description="standard deviation of the normal noise")]
Bits = Annotated[int, Field(ge=2, le=48, description="bits a row")]


class DataSection(Section):
    """What every kind of data has. From files, validation and test rows are taken from the end, test last."""

    validation_rows: Rows = Field(0, description="rows kept for validation")
    test_rows: Rows = Field(0, description="rows kept for the test")
    residency: Literal["auto", "device", "host"] = Field(
        "auto", description="whether all rows are put on the device once; auto: where they fit"
    )
    block_rows: Count | None = Field(None, description="rows that are read together; by default what suits the data")
    window_blocks: Count | None = Field(
        None, description="blocks that are shuffled together; by default 64, fewer where they take more than 64 MiB"
    )


class Scaled(DataSection):
    """Inputs that can be scaled."""

    scaling: Scaling = Field(
        "none",
        description="of the inputs, fitted to the training rows, the first million at most; a number divides them",
    )


class ScaledTargets(DataSection):
    """Targets that can be scaled, where they are real numbers."""

    target_scaling: Literal["none", "standardise"] = Field(
        "none", description="of the targets, fitted likewise; predictions are in raw units all the same"
    )


# synthetic: row i is a function of the seed and i ------------------------------------------------------------


class DoubleMoon(Scaled):
    """Two half rings facing each other, to be told apart (Haykin)."""

    kind: Literal["double-moon"]
    rows: TrainRows = 1000
    radius: Length = Field(10.0, description="mean radius of a ring")
    width: Length = Field(6.0, description="width of a ring")
    distance: Offset = Field(-4.0, description="vertical distance between the rings; negative: they interlock")
    scaling: Scaling = Field("max-abs", description="of the inputs, fitted to the training rows")

    @model_validator(mode="after")
    def _ring(self) -> DoubleMoon:
        if self.width > 2 * self.radius:
            raise ValueError("data.width must be at most twice data.radius")
        return self


class Xor(DataSection):
    """Exclusive or of two binary inputs: the four patterns, again and again."""

    kind: Literal["xor"]
    rows: TrainRows = 4


class Encoder(DataSection):
    """The identity on unit vectors, again and again, through fewer hidden units."""

    kind: Literal["encoder"]
    size: Annotated[int, Field(ge=2, le=10**6)] = Field(8, description="length of the patterns, and how many there are")
    rows: TrainRows | None = Field(None, description="training rows; by default each pattern once")


class Patterns(DataSection):
    """Patterns of bits, 0 and 1."""

    patterns: Literal["all", "random"] = Field("all", description="every one in turn, again and again, or drawn")
    rows: TrainRows | None = Field(None, description="training rows; by default each pattern once")

    @property
    def n_patterns(self) -> int:
        """How many there are."""
        n_inputs: int = getattr(self, "n_inputs")  # noqa: B009  each kind has its own default
        return 1 << n_inputs


class Parity(Patterns):
    """Whether a row of bits has an odd number of ones."""

    kind: Literal["parity"]
    n_inputs: Bits = 8


class Symmetry(Patterns):
    """Whether a row of bits reads the same backwards (Rumelhart, Hinton and Williams, 1986)."""

    kind: Literal["symmetry"]
    n_inputs: Bits = 6


class Checkerboard(DataSection):
    """Points of the unit square, or cube, in the colours of a chess board."""

    kind: Literal["checkerboard"]
    rows: TrainRows = 1000
    n_inputs: Annotated[int, Field(ge=1, le=64)] = Field(2, description="inputs a row")
    cells: Annotated[int, Field(ge=2, le=1000)] = Field(4, description="cells along a side")


class TwoSpirals(Scaled):
    """Lang and Witbrock's two spirals (1988): their 194 points, or with noise any number of points."""

    kind: Literal["two-spirals"]
    rows: TrainRows = 194
    noise: Noise = Field(0.0, description="standard deviation of the points about the spirals; 0: the 194 points")


class GaussianBlobs(Scaled):
    """Normal clouds, one a class, at equal distances from each other."""

    kind: Literal["gaussian-blobs"]
    rows: TrainRows = 1000
    n_inputs: Width = Field(2, description="inputs a row, at least one a class")
    n_classes: Annotated[int, Field(ge=2, le=1000)] = Field(2, description="how many clouds")
    bayes_error: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="what the best classifier gets wrong of equally many rows a class; by default 0.1"
    )
    distance: Length | None = Field(None, description="between the middles, in standard deviations; or bayes_error")
    proportions: list[Length] | None = Field(
        None, description="of the rows, a number a class; by default all classes are equally frequent"
    )

    @model_validator(mode="after")
    def _possible(self) -> GaussianBlobs:
        if self.n_classes > self.n_inputs:
            raise ValueError(f"data.n_inputs must be at least data.n_classes, {self.n_classes}, not {self.n_inputs}")
        if self.bayes_error is not None and self.distance is not None:
            raise ValueError("data.bayes_error and data.distance say the same; give one of them")
        if self.proportions is not None and len(self.proportions) != self.n_classes:
            given = len(self.proportions)
            raise ValueError(f"data.proportions must be {self.n_classes} numbers, one a class, not {given}")
        if self.bayes_error is not None and not 1e-12 <= self.bayes_error < 1 - 1 / self.n_classes:
            limit = f"less than {1 - 1 / self.n_classes:.6g}, which is guessing"
            raise ValueError(f"data.bayes_error must be from 1e-12 to {limit}, not {self.bayes_error}")
        return self


class Linear(Scaled, ScaledTargets):
    """A linear function of random inputs of variance 1, with normal noise."""

    kind: Literal["linear"]
    rows: TrainRows = 1000
    n_inputs: Width = Field(8, description="inputs a row")
    n_targets: Width = Field(1, description="targets a row")
    distribution: Distribution = Field("normal", description="of the inputs")
    noise: Noise = 0.1


class Teacher(Scaled, ScaledTargets):
    """A random tanh network of inputs of variance 1, with normal noise, whose variance is the best possible mse."""

    kind: Literal["teacher"]
    rows: TrainRows = 1000
    n_inputs: Width = Field(20, description="inputs a row")
    hidden: Annotated[list[Width], Field(min_length=1, max_length=MOST_LAYERS)] = Field(
        [32], description="units of the teacher's hidden layers"
    )
    n_targets: Width = Field(1, description="targets a row")
    distribution: Distribution = Field("normal", description="of the inputs")
    noise: Noise = 0.1


class Friedman1(Scaled, ScaledTargets):
    """10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 + 10 x4 + 5 x5 of uniform inputs (Friedman, 1991)."""

    kind: Literal["friedman1"]
    rows: TrainRows = 1000
    n_inputs: Annotated[int, Field(ge=5, le=2**31 - 1)] = Field(10, description="inputs a row; five of them matter")
    noise: Noise = 1.0


class Friedman2(Scaled, ScaledTargets):
    """The impedance of a circuit, sqrt(x1^2 + (x2 x3 - 1 / (x2 x4))^2) (Friedman, 1991)."""

    kind: Literal["friedman2"]
    rows: TrainRows = 1000
    noise: Noise = 125.0


class Friedman3(Scaled, ScaledTargets):
    """The phase of the same circuit, arctan((x2 x3 - 1 / (x2 x4)) / x1) (Friedman, 1991)."""

    kind: Literal["friedman3"]
    rows: TrainRows = 1000
    noise: Noise = 0.1


class SineMixture(ScaledTargets):
    """Sines of x in [-1, 1): harmonic k has amplitude 1 / k and a random phase."""

    kind: Literal["sine-mixture"]
    rows: TrainRows = 1000
    components: Annotated[int, Field(ge=1, le=100)] = Field(3, description="how many sines")
    noise: Noise = 0.1


class Heteroscedastic(ScaledTargets):
    """A sine of x in [0, 1) whose noise grows with x, so that its quantiles do not run side by side."""

    kind: Literal["heteroscedastic"]
    rows: TrainRows = 1000
    noise: Noise = Field(0.5, description="the standard deviation of the normal noise is noise (0.1 + x)")


# from files --------------------------------------------------------------------------------------------------


class TableData(DataSection):
    """A csv file with a header, or a Parquet file, of any size."""

    kind: Literal["table"]
    path: str = Field(description="the .csv or .parquet file, relative to the working folder")
    target_columns: Annotated[list[str], Field(min_length=1)] = Field(description="what is to be predicted")
    drop_columns: list[str] = Field([], description="columns that are not inputs")
    categorical_columns: list[str] = Field([], description="columns that become one input a category (or the class)")
    standardise_columns: list[str] | None = Field(
        None, description="numeric columns to standardise; by default all, the targets too"
    )
    weight_column: str | None = Field(None, description="the column of what each row weighs in the loss")


class ArrayData(Scaled, ScaledTargets):
    """A pair of .npy files."""

    kind: Literal["arrays"]
    inputs: str = Field(description="the .npy file of the inputs (rows, n_inputs), relative to the working folder")
    targets: str = Field(description="the .npy file of the targets (rows, n_targets), or (rows,) of class indices")
    n_classes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="for class indices; by default the largest of the training rows plus 1"
    )
    weights: str | None = Field(None, description="the .npy file of what each row weighs in the loss: (rows,)")


class ShardData(Scaled, ScaledTargets):
    """A folder of shards that `gpu-bp generate` wrote."""

    kind: Literal["shards"]
    path: str = Field(description="the folder, relative to the working folder")


SourceName = Annotated[str, Field(json_schema_extra={"pattern": "^.+:.+$"})]


class SourceChoice(Section):
    """A source by name, or what makes one, such as its class, with its arguments beside the name."""

    model_config = ConfigDict(extra="allow")
    kind: SourceName = Field(description="module:object or path/to/file.py:object")

    @field_validator("kind")
    @classmethod
    def _named(cls, value: str) -> str:
        if not all(value.rpartition(":")):
            raise ValueError(f"must be of the form module:object or path/to/file.py:object, not {short(value)}")
        return value

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments given."""
        return self.model_extra or {}


NamedSource = Annotated[SourceChoice, BeforeValidator(named, json_schema_input_type=SourceChoice | SourceName)]


class OwnSources(Section):
    """A source for each split."""

    train: NamedSource
    validation: NamedSource | None = None
    test: NamedSource | None = None


class OwnData(DataSection):
    """Sources of your own: named here, or given from Python, `gpu_bp.train(config, sources=...)`."""

    kind: Literal["own"]
    sources: OwnSources | None = Field(None, description="a source for each split, or what makes one")

    @model_validator(mode="after")
    def _splits(self) -> OwnData:
        if self.validation_rows or self.test_rows:
            raise ValueError("data.kind own: validation and test rows are sources of their own, not numbers of rows")
        return self


Synthetic = (
    DoubleMoon
    | Xor
    | Encoder
    | Parity
    | Symmetry
    | Checkerboard
    | TwoSpirals
    | GaussianBlobs
    | Linear
    | Teacher
    | Friedman1
    | Friedman2
    | Friedman3
    | SineMixture
    | Heteroscedastic
)
Data = Annotated[Synthetic | TableData | ArrayData | ShardData | OwnData, Field(discriminator="kind")]
