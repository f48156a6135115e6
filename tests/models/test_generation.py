"""What an exported model tells programs that generate with it."""

import pytest

from tutelage.models.generation import stop_at
from tutelage.testing.models import tiny_model


@pytest.mark.parametrize(("made", "found"), [(True, [1, 5]), (False, [1, 5, 7])])
def test_an_end_that_was_a_default_of_the_models_config_is_none(made, found):
    model = tiny_model()
    model.generation_config.eos_token_id = 7
    model.generation_config._from_model_config = made
    stop_at(model, {5, 1})
    assert model.generation_config.eos_token_id == found
    assert not model.generation_config._from_model_config
