import pytest

from unpoison.cli.options import batch_size_of
from unpoison.errors import ConfigError


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", ""])
def test_a_batch_size_is_auto_or_a_number(text):
    with pytest.raises(
        ConfigError, match=f"--batch-size {text}: expected auto or a whole number of at least 1"
    ):
        batch_size_of(text)
