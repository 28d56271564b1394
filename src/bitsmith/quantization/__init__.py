"""Sites, quantizers, bit-widths, plans, targets and cost: everything between numerics and the methods."""

from bitsmith.quantization.allocate import Allocation, allocate, uniform_plan
from bitsmith.quantization.batchnorm import reestimate_batchnorm
from bitsmith.quantization.bits import BitWidth, FixedBits
from bitsmith.quantization.budget import Budget, BudgetCost
from bitsmith.quantization.cost import CostModel, measure
from bitsmith.quantization.cost_table import CostTable
from bitsmith.quantization.coverage import Coverage
from bitsmith.quantization.layers import MatMul
from bitsmith.quantization.observe import calibrate
from bitsmith.quantization.plan import CommitReport, Plan, PlannedSite, collapse, commit, plan_of, set_bits
from bitsmith.quantization.prepare import parameter_groups, prepare
from bitsmith.quantization.quantizer import Quantizer, check_calibrated, redraw, sites
from bitsmith.quantization.scheme import FLOAT, Scheme
from bitsmith.quantization.target import TARGETS, Target, get_target
from bitsmith.quantization.trace import trace

__all__ = [
    "FLOAT",
    "TARGETS",
    "Allocation",
    "BitWidth",
    "Budget",
    "BudgetCost",
    "CommitReport",
    "CostModel",
    "CostTable",
    "Coverage",
    "FixedBits",
    "MatMul",
    "Plan",
    "PlannedSite",
    "Quantizer",
    "Scheme",
    "Target",
    "allocate",
    "calibrate",
    "check_calibrated",
    "collapse",
    "commit",
    "get_target",
    "measure",
    "parameter_groups",
    "plan_of",
    "prepare",
    "redraw",
    "reestimate_batchnorm",
    "set_bits",
    "sites",
    "trace",
    "uniform_plan",
]
