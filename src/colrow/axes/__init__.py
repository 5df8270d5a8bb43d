"""Which dimensions belong together: factors, one rule per operator, classes, legality."""

from colrow.axes.context import Marks, RuleContext
from colrow.axes.cutting import dimension_layout
from colrow.axes.factor import Factor, Reason
from colrow.axes.factors import Factors
from colrow.axes.infer import infer
from colrow.axes.registry import Registry, Rule, rule
from colrow.axes.result import Axes, Axis
from colrow.axes.rules.default import default_registry

__all__ = [
    "Axes",
    "Axis",
    "Factor",
    "Factors",
    "Marks",
    "Reason",
    "Registry",
    "Rule",
    "RuleContext",
    "default_registry",
    "dimension_layout",
    "infer",
    "rule",
]
