"""Presets can work, a configuration that cannot is refused by the field's name, and JSON brings back what it was given."""

import dataclasses
import json
import math

import pytest

from hstu_lab.config import ACTIONS, COUNTS, PRESETS, RAB_KINDS, SCHEMA_VERSION, TASKS, ConfigError, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_by_their_name_and_fit_a_32_bit_token(name):
    config = preset(name)
    assert config.preset == name
    assert config.token_limit <= 2**31
    assert config.max_history >= 50
    assert len(config.task_weights) == len(TASKS)
    assert config.num_actions == len(ACTIONS)


def test_every_whole_number_is_checked():
    fields = dataclasses.fields(preset("tiny"))
    assert set(COUNTS) == {field.name for field in fields if field.type == "int"}


def test_the_large_preset_is_the_one_described():
    config = preset("gr-3b")
    assert (config.num_items, config.d_model, config.num_layers, config.num_heads) == (50_000, 1024, 12, 16)
    assert config.num_heads * config.d_qk == config.num_heads * config.d_v == config.d_model


@pytest.mark.parametrize("num_users", [0, 301])
def test_a_request_keeps_room_for_the_user_and_a_slate(num_users):
    config = preset("tiny").replace(num_users=num_users)
    assert config.num_context == bool(num_users)
    assert config.num_context + config.max_history + config.slate_size == config.max_seq_len


def test_tables_start_with_the_items_and_end_with_the_users():
    config = preset("tiny")
    assert config.tables == (("item", 501), ("category", 17), ("creator", 65), ("user", 301))
    assert config.replace(num_users=0).tables == (("item", 501), ("category", 17), ("creator", 65))


def test_tokens_of_users_lie_above_those_of_events():
    config = preset("tiny")
    assert config.user_token_base == config.num_items * config.num_actions * config.num_time_levels
    assert config.token_limit == config.user_token_base + config.num_users


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({field: 0}, f"{field} is 0: give a whole number from 1 up")
            for field in COUNTS
            if field not in ("num_users", "num_actions")
        ),
        ({"num_users": -1}, "num_users is -1: give a whole number from 0 up"),
        ({"d_model": 64.0}, "d_model is 64.0: give a whole number"),
        ({"num_layers": "3"}, "num_layers is '3': give a whole number"),
        ({"side_features": (("category", 0),)}, "side_features gives 'category' 0 rows: give 1 or more"),
        ({"rab": "time"}, f"rab is 'time': use one of {', '.join(RAB_KINDS)}"),
        ({"task_weights": (1, 2)}, f"task_weights has 2 values: give one for each of {', '.join(TASKS)}"),
        ({"num_items": 2**20}, "num_items x num_actions x num_time_levels + num_users is 3758096685, over 2^31: lower"),
        ({"max_seq_len": 11}, "max_seq_len is 11: it must exceed slate_size + num_context = 11"),
        ({"num_users": 0, "max_seq_len": 10}, "max_seq_len is 10: it must exceed slate_size + num_context = 10"),
        ({"width": 3}, "unknown model field 'width': see "),
        ({"num_items": True}, "num_items is True: give a whole number from 1 up"),
        ({"num_actions": 6}, "num_actions is 6: give a whole number from 7 up"),
        ({"temperature": 0}, "temperature is 0: give a number above 0"),
        ({"temperature": None}, "temperature is None: give a number above 0"),
        ({"norm_eps": math.nan}, "norm_eps is nan: give a number above 0"),
        ({"dropout": 1.0}, "dropout is 1.0: give a number from 0 to below 1"),
        ({"target_time_bias": 1}, "target_time_bias is 1: give true or false"),
        ({"task_weights": ("a", 1, 2)}, "task_weights is ('a', 1, 2): give one number for each task"),
        ({"task_weights": (1, math.inf, 2)}, "task_weights is (1.0, inf, 2.0): give finite numbers"),
        ({"side_features": (("category",),)}, "side_features is (('category',),): give pairs of a name and its rows"),
        ({"side_features": (("user", 5),)}, "side_features gives 'user', the name of another table"),
        ({"side_features": (("a", 5), ("a", 6))}, "side_features gives 'a', the name of another table"),
    ],
)
def test_what_cannot_work_is_refused_by_the_name_of_the_field(changes, message):
    with pytest.raises(ConfigError) as refused:
        preset("tiny").replace(**changes)
    assert str(refused.value).startswith(message)


def test_the_shortest_sequence_that_works_has_one_event():
    assert preset("tiny").replace(max_seq_len=12).max_history == 1
    assert preset("tiny").replace(num_users=0, max_seq_len=11).max_history == 1


def test_the_largest_token_fits_32_bits_exactly():
    room = 2**31 - preset("tiny").user_token_base
    assert preset("tiny").replace(num_users=room).token_limit == 2**31
    with pytest.raises(ConfigError, match="num_users"):
        preset("tiny").replace(num_users=room + 1)


def test_an_unknown_preset_is_told_the_known_ones():
    with pytest.raises(ConfigError, match="preset 'huge' is unknown: use one of tiny, small, ml-1m, ml-1m-large, gr-3b"):
        preset("huge")


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").d_model = 64


@pytest.mark.parametrize("name", PRESETS)
def test_json_brings_back_an_equal_config(name):
    config = preset(name).replace(task_weights=(1, 2, 3), rab="position")
    again = type(config).from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(schema_version=SCHEMA_VERSION + 1), "schema_version is 2, this release reads 1"),
        (lambda fields: fields.pop("schema_version"), "not JSON with a schema_version"),
        (lambda fields: fields.update(colour="red"), "unknown model field 'colour'"),
        (lambda fields: fields.pop("d_model"), "config is incomplete: .*'d_model'"),
        (lambda fields: fields.update(d_model=0), "d_model is 0"),
        (lambda fields: fields.update(d_model=None), "d_model is None"),
        (lambda fields: fields.update(side_features=7), "side_features is 7: give pairs"),
    ],
)
def test_json_of_another_shape_is_refused(change, message):
    config = preset("tiny")
    fields = json.loads(config.to_json())
    change(fields)
    with pytest.raises(ConfigError, match=message):
        type(config).from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null"])
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(ConfigError, match="not JSON with a schema_version"):
        type(preset("tiny")).from_json(text)
