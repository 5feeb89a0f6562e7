"""Batches are cut without losing what belongs to a sample; networks know their own parameters."""

import torch as th
from torch import nn

from cm.random_util import SampleStreams
from cm.types import Batch, Networks, NoiseSource


def batch():
    references = Batch(th.ones(7, 1, 2, 2))
    cond = {"y": th.tensor([5, 6, 7]), "augment_labels": th.arange(6.0).reshape(3, 2)}
    return Batch(th.arange(12.0).reshape(3, 1, 2, 2), cond, th.tensor([10, 11, 12]), th.tensor([3, 1, 2]), references)


def test_rows_take_all_that_belongs_to_a_sample_and_share_the_references():
    whole = batch()
    rest = whole.rows(1, 5)
    assert len(whole) == 3 and len(rest) == 2
    assert th.equal(rest.images, whole.images[1:]) and rest.cond["y"].tolist() == [6, 7]
    assert rest.cond["augment_labels"].tolist() == [[2, 3], [4, 5]]
    assert rest.positions.tolist() == [11, 12] and rest.indices.tolist() == [1, 2]
    assert rest.references is whole.references


def test_a_batch_unpacks_as_the_pair_that_guided_diffusion_yields():
    images, cond = whole = batch()
    assert images is whole.images and cond is whole.cond
    bare = Batch(th.zeros(2, 3, 4, 4)).rows(0, 1)
    assert (bare.cond, bare.positions, bare.indices, bare.references) == ({}, None, None, None)


def test_a_batch_goes_to_a_device_with_its_conditions_and_references_but_not_its_positions():
    there = batch().to("meta")
    assert {there.images.device.type, *(value.device.type for value in there.cond.values())} == {"meta"}
    assert there.references.images.device.type == "meta"
    assert there.positions.tolist() == [10, 11, 12] and there.indices.tolist() == [3, 1, 2]


def test_networks_average_the_parameters_of_their_modules_unless_told_of_others():
    online, target, masters = nn.Linear(2, 3), nn.Linear(2, 3), [th.zeros(6)]
    nets = Networks(online, online, target, target, online_params=masters)
    assert nets.online_params is masters and nets.teacher_params == []
    assert [id(param) for param in nets.target_params] == [id(param) for param in target.parameters()]


def test_the_streams_of_a_run_are_a_source_of_noise():
    assert isinstance(SampleStreams(0, [1, 2]), NoiseSource) and not isinstance(object(), NoiseSource)
