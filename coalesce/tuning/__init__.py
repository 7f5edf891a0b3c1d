"""What was measured: the best kernel, and its block sizes, for a heavy op at a width on a kind of device.

    Key         what an entry is about: device kind, version of the kernels, op, problems, lanes on each
    Entry       the winner, its time, and everything that was tried
    Database    entries by key; a file of JSON, one entry a line
    Tuned       a database as the compiler asks it, for one kind of device

`python -m coalesce tune` fills a database (coalesce.measuring); nothing here runs anything on a device.
"""

from coalesce.tuning.database import (
    Database as Database,
    known as known,
    load as load,
    packaged as packaged,
    save as save,
    user_file as user_file,
)
from coalesce.tuning.entry import (
    candidate_name as candidate_name,
    Entry as Entry,
    Key as Key,
    key_of as key_of,
    named as named,
    op_text as op_text,
)
from coalesce.tuning.tuned import Tuned as Tuned, tuned_on as tuned_on, UNTUNED as UNTUNED
