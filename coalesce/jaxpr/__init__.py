"""Everything that takes a jaxpr apart or puts one together, and every difference between JAX versions.

The rest of the library sees these names. A *closed* jaxpr here has no constants: `trace` turns them into weights.
Equations are rebuilt in two ways only: `respell` replaces operands and same-signature regions of an equation, and
`stage` traces ordinary `lax` code, whose equations `Splicer` inlines. Control flow is never edited by hand: its
parameters differ between versions, the signature of `lax.scan` does not.
"""

from coalesce.jaxpr.build import (
    close as close,
    constant as constant,
    drop_dead as drop_dead,
    expand_calls as expand_calls,
    fresh as fresh,
    fresh_out as fresh_out,
    read as read,
    respell as respell,
    Splicer as Splicer,
    stage as stage,
    under as under,
)
from coalesce.jaxpr.carried import (
    dumps as dumps,
    loads as loads,
    Uncarried as Uncarried,
)
from coalesce.jaxpr.clients import (
    loaded_at as loaded_at,
    second_client as second_client,
    view_at as view_at,
)
from coalesce.jaxpr.constants import separate_consts as separate_consts
from coalesce.jaxpr.control import (
    as_cond as as_cond,
    as_scan as as_scan,
    as_while as as_while,
    Cond as Cond,
    ends_by_row as ends_by_row,
    region_args as region_args,
    region_labels as region_labels,
    region_operands as region_operands,
    REGIONS as REGIONS,
    regions as regions,
    Scan as Scan,
    While as While,
)
from coalesce.jaxpr.keys import (
    key_layout as key_layout,
    key_struct as key_struct,
)
from coalesce.jaxpr.read import (
    Atom as Atom,
    aval_struct as aval_struct,
    callee as callee,
    CALLS as CALLS,
    closed as closed,
    context_key as context_key,
    dtype as dtype,
    Eqn as Eqn,
    invars as invars,
    is_drop as is_drop,
    is_jaxpr as is_jaxpr,
    is_key as is_key,
    is_wide as is_wide,
    Literal as Literal,
    literal_value as literal_value,
    nbytes as nbytes,
    outvars as outvars,
    primitives as primitives,
    scopes as scopes,
    shape as shape,
    short as short,
    source as source,
    struct_short as struct_short,
    subjaxprs as subjaxprs,
    takes_wide as takes_wide,
    Var as Var,
    walk as walk,
)
from coalesce.jaxpr.rebuilt import (
    rebuilt as rebuilt,
    rebuilt_scan as rebuilt_scan,
    staged as staged,
)
from coalesce.jaxpr.run import (
    bind as bind,
    context_of as context_of,
    cpu_small_call as cpu_small_call,
    evaluate as evaluate,
    is_jit_disabled as is_jit_disabled,
    precision_as_traced as precision_as_traced,
    set_weak_type as set_weak_type,
    verify as verify,
)
from coalesce.jaxpr.sending import batched_device_put as batched_device_put
from coalesce.jaxpr.widened import evaluate_widened as evaluate_widened
