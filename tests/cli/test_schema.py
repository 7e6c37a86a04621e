import json

import pytest

from unpoison.report.schemas import SCHEMAS


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_printed_as_json(run, name):
    done = run("schema", name)
    assert done.exit_code == 0 and json.loads(done.stdout) == SCHEMAS[name]


def test_an_unknown_name_is_wrong_usage(run):
    done = run("schema", "report")
    assert (
        done.exit_code == 2
        and "schema 'report': expected verdict or findings or plan or benchmark or audit" in done.stderr
    )
