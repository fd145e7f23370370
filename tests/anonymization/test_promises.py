"""Whatever the table says: no group below k people, no photograph twice, no patient where he must
not be. People are counted here by themselves, from patients and files."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from anonymization.context import Context
from anonymization.grouped import _assign
from anonymization.settings import Settings
from datasets.table import read_table
from utils.errors import UserError


def people_of(patients, digests):
    """A number for everyone: photographs joined by patient (in any letters) or by content."""
    same = np.equal.outer(np.array(digests), np.array(digests))
    if patients is not None:
        names = [p.lower().lstrip('0') for p in patients]
        same |= np.equal.outer(np.array(names), np.array(names))
    return connected_components(same)[1].tolist()


@st.composite
def tables(draw):
    """(patients or None, eyes, digests): few people, spelt differently, photographs copied."""
    n = draw(st.integers(4, 30))
    names = st.sampled_from(
        ['P1', 'p1', 'P2', 'p3', 'ä', 'Ä', '7', '07', 'x y'] + [f'q{i}' for i in range(30)]
    )
    patients = draw(st.none() | st.lists(names, min_size=n, max_size=n))
    eyes = draw(st.lists(st.sampled_from(['left', 'right']), min_size=n, max_size=n))
    digests = [draw(st.sampled_from([i, i, i, max(0, i - 1), 0])) for i in range(n)]
    return patients, eyes, [str(d) for d in digests]


@settings(max_examples=80, deadline=None)
@given(
    table=tables(),
    k=st.integers(2, 5),
    policy=st.sampled_from(['distinct', 'together']),
    surplus=st.sampled_from(['error', 'suppress']),
    strata=st.sampled_from([(), ('eyes',)]),
    method=st.sampled_from(['default', 'published', 'mdav']),
)
def test_no_group_below_k_people(tmp_path_factory, table, k, policy, surplus, strata, method):
    patients, eyes, digests = table
    csv = Path(tmp_path_factory.getbasetemp() / 'table.csv')
    rows = [f'id{i},{eyes[i]}' + (f',{patients[i]}' if patients else '') for i in range(len(eyes))]
    csv.write_text(
        '\n'.join(['id_code,eye' + (',patient_id' if patients else ''), *rows]), encoding='utf-8'
    )
    latents = np.array(
        [np.random.default_rng(int(d)).standard_normal(6) for d in digests], np.float32
    )
    run = Context(
        tmp_path_factory.getbasetemp(),
        read_table(csv, ids_only=True),
        SimpleNamespace(contents=digests, eyes=eyes),
        SimpleNamespace(psp=SimpleNamespace(decoder=SimpleNamespace(style_dim=6)), content=None),
        Settings(k=k, policy=policy, surplus=surplus, strata=strata, clustering=method),
        torch.device('cpu'),
        threads=1,
        facts={},
    )
    try:
        run.check()
    except UserError as error:
        with pytest.raises(UserError, match=re.escape(str(error))):  # not one too many
            _assign(run, latents)
        return
    try:
        labels = _assign(run, latents)
    except UserError:
        return
    people = people_of(patients, digests)
    for group in range(1, labels.max() + 1):
        members = np.flatnonzero(labels == group)
        assert len({people[i] for i in members}) >= k
        if policy == 'distinct':
            assert len({people[i] for i in members}) == len(members)
        if strata:
            assert len({eyes[i] for i in members}) == 1
    used = [digests[i] for i in np.flatnonzero(labels)]
    assert len(set(used)) == len(used)
    if policy == 'together':
        homes = {(people[i], labels[i]) for i in np.flatnonzero(labels)}
        assert len({person for person, _ in homes}) == len(homes)
