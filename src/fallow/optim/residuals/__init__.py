"""Rules for the part of a gradient that the basis does not hold."""

from fallow.optim.residuals.apollo import Apollo
from fallow.optim.residuals.drop import Drop
from fallow.optim.residuals.feedback import Feedback, Momentum
from fallow.optim.residuals.fira import Fira
from fallow.optim.residuals.free import SGD, Sign
from fallow.optim.residuals.residual import Residual

RESIDUALS: dict[str, type[Residual]] = {kind.name: kind for kind in (Drop, Fira, Sign, SGD, Feedback, Momentum, Apollo)}
