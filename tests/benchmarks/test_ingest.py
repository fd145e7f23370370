"""The benchmark of reading: both sides are measured, with the parts that reading consists of."""

import re

from benchmarks import ingest


def test_reading_is_measured_by_parts_at_both_sides(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ingest, 'FRAME', (480, 320))
    monkeypatch.setattr(ingest, 'DRAWN', 64)
    ingest.make_photographs(tmp_path / 'photographs', 1)
    assert ingest.build_parser().parse_args([]).size == [512, 256]
    for size in (64, 32):
        rates = ingest.measure(tmp_path / 'photographs', size, 1, tmp_path / 'crops')
        ingest.report({'now': rates}, size)
        said = capsys.readouterr().out
        assert f'into {size} x {size}' in said
        for way in ('whole, Pillow', 'scaled', 'entropy code', 'scaled, not resized'):
            assert re.search(rf'\| {way}, now \| \d', said), way
        assert re.search(r'reading scaled over whole, Pillow: \d', said)
