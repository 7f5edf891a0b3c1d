"""What an experiment is given and does not know it refuses, before it measures anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from coalesce.models import NAMES
from experiments import newcomer
from experiments.list_flags import (
    define_counts,
    define_fields,
    define_fields_of_models,
    define_names,
    define_numbers,
    fields_of,
)

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = [path.stem for path in sorted(FOLDER.glob("*.py")) if "__main__" in path.read_text()]

pytestmark = pytest.mark.once


@pytest.fixture
def own() -> flags.FlagValues:
    found = flags.FlagValues()
    flags.DEFINE_enum("model", "mlp", NAMES, "a model", flag_values=found)
    define_counts("widths", [1, 16], "how many", flag_values=found)
    define_counts("bytes", None, "how large", least=4, flag_values=found)
    define_numbers("rates", [0.25, 500], "how often", flag_values=found)
    define_numbers("cvs", [], "how uneven", good=lambda cv: cv >= 0, wanted="from 0", flag_values=found)
    define_names("methods", ["one", "in, two"], "which", ("one", "in, two"), flag_values=found)
    define_fields("fields", ["width=64"], "of the model", flag_values=found)
    define_fields_of_models("others", "of several models", flag_values=found)
    return found


def test_several_values_are_read(own):
    own(["script"])
    assert (own.widths, own.bytes, own.rates, own.cvs) == ([1, 16], None, [0.25, 500.0], [])
    assert fields_of(own.fields) == {"width": 64}
    own(
        ["script", "--widths=4, 8", "--rates=1e3,0.5", "--cvs=0", "--fields=width=32,layers=2", "--others=lstm.steps=5"]
    )
    assert (own.widths, own.rates, own.cvs, own.others) == ([4, 8], [1000.0, 0.5], [0.0], ["lstm.steps=5"])
    assert fields_of(own.fields) == {"width": 32, "layers": 2}
    assert own["rates"].serialize() == "--rates=1000,0.5" and own["fields"].serialize() == "--fields=width=32,layers=2"
    own(["script", "--cvs=", '--methods="in, two"', '--fields="width=2"'])
    assert (own.cvs, own.methods, own["methods"].serialize()) == ([], ["in, two"], '--methods="in, two"')


@pytest.mark.parametrize(
    "wrong, told",
    [
        ("--widths=4,x", "flag --widths=4,x: what is x. A number of at least 1 is wanted"),
        *((f"--widths={count}", f"what is {count}. A number of at least 1") for count in ("0", "-1", "1.5", "1e3")),
        *((f"--{name}=", f"flag --{name}=: nothing is given; 1 or more are wanted") for name in ("widths", "methods")),
        ("--widths=1,,2", "what is . A number of at least 1"),
        ("--bytes=3", "what is 3. A number of at least 4"),
        *(
            (f"--rates=500,{rate}", f"what is {rate}. A number above 0")
            for rate in ("x", "0", "-1", "nan", "inf", "1_0x")
        ),
        ("--cvs=-0.5", "what is -0.5. A number from 0"),
        ("--methods=one,three", "what is three. There are one, in, two"),
        *((f"--fields={item}", f"what is {item}. A field is set as in width=64") for item in ("width", "width=wide")),
        ("--fields==3", "what is =3. A field is set"),
        ("--fields=wdth=3", "mlp has not all of wdth; its fields are layers, width"),
        ("--fields=dtype=3", "mlp has not all of dtype"),
        ("--model=gru", "gru has not all of width; its fields are .*hidden"),
        ("--others=lstn.steps=5", "what is lstn. There are resnet18, .*, mlp; of lstn.steps=5"),
        ("--others=lstm.stps=5", "lstm has not all of stps; its fields are .*steps"),
        ("--others=lstm", "A field is set as in width=64; of lstm, where"),
    ],
)
def test_what_is_wrong_is_told_with_what_is_known(own, wrong, told):
    with pytest.raises(flags.Error, match=told):
        own(["script", wrong])


def test_a_field_that_varies_is_one_of_those_given(tmp_path):
    with pytest.raises(SystemExit, match="what is width. --vary is one of --fields"):
        newcomer.main(["--fields=layers=2", "--vary=width", "--turns=1", f"--out={tmp_path}"])


def refused(script: str, wrong: str) -> str:
    command = [sys.executable, "-m", f"experiments.{script}", *wrong.split()]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=FOLDER.parent, env=env, capture_output=True, text=True, timeout=120)
    told = done.stdout + done.stderr
    assert done.returncode and "Traceback" not in told, told
    return told


def test_what_is_no_rate_is_refused():
    assert "--rates=x: what is x? A number above 0 is wanted" in refused("hindsight", "--rates=x")


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, wrong, told",
    [
        ("ablation", "--databases=nowhere.json", "there is no file nowhere.json"),
        ("banked", "--fields=stage=3", "its fields are block, stages"),
        ("coalesced_sgemm", "--products=x", "There are sgemm"),
        ("coalesced_sgemm", "--sizes=sgemm=64x32", "what is sgemm=64x32?"),
        ("coalesced_sgemm", "--problems=x", "what is x?"),
        ("collaborative_kernels", "--ops=x", "what is x? There are"),
        ("compile_cost", "--tenants=x", "what is x?"),
        ("cost_error", "--dtypes=float8", "There are float32, bfloat16"),
        ("cost_error", "--groups=0", "at least 1"),
        ("cost_error", "--again=nowhere.json", "there is no such file"),
        ("executables", "--executables=x", "what is x?"),
        ("executables", "--sets=x", "what is x? Sets: mlps"),
        ("executables", "--policy=x", "should be one of <auto|always|never>"),
        ("host_time", "--bytes=2", "at least 4"),
        ("isolation", "--methods=x", "There are coalescing, fifo"),
        ("isolation", "--tenants=", "nothing is given"),
        ("kernel_times", "--model=mlp", "needs a GPU"),
        ("kernel_times", "--model=x", "should be one of <resnet18"),
        ("mixed_family", "--kinds=mlp.wdth=3:1", "unexpected keyword argument 'wdth'"),
        ("mixed_kernels", "--policies=x", "There are never, auto, always"),
        ("mixed_tenants", "--sets=x", "what is x? Sets: mlps"),
        ("mixed_tenants", "--sets=", "--sets= names none"),
        ("mixed_tenants", "--waste_bound=2", "from 0 to less than 1"),
        ("mixed_tenants", "--fields=mlp.width", "A field is set as in"),
        ("mixed_tenants", "--methods=x", "Methods: sequential"),
        ("mixed_tenants", "--compiler_options=x", "not a JSON object"),
        ("mixed_tenants", "--precision=x", "--precision=x: "),
        ("multiplexing", "--models=x", "There are resnet18"),
        ("multiplexing", "--tenants=x", "what is x?"),
        ("multiplexing", "--beside=-1", "non-negative"),
        ("newcomer", "--widths=x", "what is x?"),
        ("overload", "--policies=x", "there is no policy 'x'; there are coalescing"),
        ("planning_time", "--models=", "nothing is given"),
        ("planning_time", "--platform=x", "should be one of <cpu|gpu>"),
        ("segments", "--longer=x", "--longer=x: mlp has not all of"),
        ("segments", "--longer=width", "is set by --fields, too"),
        ("serve_demo", "--process=csv", "needs --csv=FILE"),
        ("serve_demo", "--csv=nowhere.csv", "nothing else takes one"),
        ("serve_demo", "--tenants=mlp:x:3", "'mlp:x:3': "),
        ("shape_clusters", "--bounds=1.5", "from 0 to less than 1"),
        ("shape_clusters", "--waste_bound=2", "from 0 to less than 1"),
        ("shape_clusters", "--function=nowhere:f", "nowhere"),
        ("simulator_speed", "--tenants=0", "0 is not a positive integer"),
        ("slo_attainment", "--loads=x", "--loads=x: what is x?"),
        ("slo_attainment", "--policies=x", "there is no policy 'x'; there are coalescing"),
        ("slo_attainment", "--real --policies=x", "there is no policy 'x'; there are coalescing, edf"),
        ("tenant_scaling", "--override=x=1", "mlp has not all of x"),
        ("tenant_scaling", "--image_size=32", "mlp has not all of image_size"),
        ("tenant_scaling", "--tenants=", "nothing is given"),
        ("tenant_scaling", "--tolerance=-1", "a number from 0 is wanted"),
        ("tenant_scaling", "--seconds=nan", "a number from 0 is wanted"),
    ],
)
def test_what_is_malformed_is_refused(script, wrong, told):
    assert told in refused(script, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("stray", ["stray", "--stray"])
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "peers_worker"])  # which others start
def test_what_is_stray_is_refused(script, stray):
    assert "stray" in refused(script, stray)
