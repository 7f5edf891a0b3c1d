"""The tenant models of the experiments and tests, in plain flax linen; `by_name` gives each one the same shape."""

from coalesce.models.zoo import by_name as by_name, Model as Model, NAMES as NAMES
