"""croissant.json: a release described in Croissant 1.1 (JSON-LD), for tools that read it.

https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html
"""

from typing import Any

from anonymization.card import filled

VERSION = 'http://mlcommons.org/croissant/1.1'
PICTURES, GRADES = 'pictures', 'grades'  # record sets
_TERMS = (
    'arrayShape',
    'citeAs',
    'column',
    'containedIn',
    'equivalentProperty',
    'extract',
    'field',
    'fileObject',
    'fileProperty',
    'fileSet',
    'format',
    'includes',
    'isArray',
    'isLiveDataset',
    'jsonPath',
    'key',
    'md5',
    'parentField',
    'path',
    'recordSet',
    'references',
    'regex',
    'repeated',
    'replace',
    'samplingRate',
    'separator',
    'source',
    'subField',
    'transform',
)
_CONTEXT: dict[str, Any] = {
    '@language': 'en',
    '@vocab': 'https://schema.org/',
    'sc': 'https://schema.org/',
    'cr': 'http://mlcommons.org/croissant/',
    'rai': 'http://mlcommons.org/croissant/RAI/',
    'dct': 'http://purl.org/dc/terms/',
    'conformsTo': 'dct:conformsTo',
    'name': {'@container': '@language'},
    'description': {'@container': '@language'},
    'data': {'@id': 'cr:data', '@type': '@json'},
    'examples': {'@id': 'cr:examples', '@type': '@json'},
    'dataType': {'@id': 'cr:dataType', '@type': '@vocab'},
    **{term: f'cr:{term}' for term in _TERMS},
}


def describe(
    manifest: dict[str, Any],
    tables: dict[str, str],
    columns: list[str],
    description: str,
    grade_names: tuple[str, ...],
) -> dict[str, Any]:
    """The description as a JSON-able dict.

    tables: name -> SHA-256 of metadata.csv and labels.csv, in this order; columns: of
    metadata.csv, `file_name` first. A date of publication that was not given is left out, since
    brackets in its place would be no date.
    """
    card = filled(manifest['card'])
    date = manifest['card']['date_published']
    record_sets = [_pictures(next(iter(tables)), columns)]
    if 'label' in columns:
        record_sets.append(_grades(grade_names))
    return {
        '@context': _CONTEXT,
        '@type': 'sc:Dataset',
        'conformsTo': VERSION,
        'name': card['pretty_name'],
        'description': description,
        'license': card['license'],
        'url': card['url'],
        'creator': {'@type': 'sc:Organization', 'name': card['creator']},
        **({} if date is None else {'datePublished': date}),
        'version': card['version'],
        'citeAs': card['citation'],
        'keywords': ['retina', 'fundus photograph', 'synthetic data', 'k-anonymity'],
        'isLiveDataset': False,
        'distribution': [*(_table(name, digest) for name, digest in tables.items()), _FILES],
        'recordSet': record_sets,
    }


_FILES = {
    '@type': 'cr:FileSet',
    '@id': 'images',
    'name': 'images',
    'description': 'The pictures. manifest.json lists the SHA-256 of each.',
    'encodingFormat': 'image/png',
    'includes': 'images/*.png',
}


def _table(name: str, digest: str) -> dict[str, str]:
    return {
        '@type': 'cr:FileObject',
        '@id': name,
        'name': name,
        'contentUrl': name,
        'encodingFormat': 'text/csv',
        'sha256': digest,
    }


def _pictures(table: str, columns: list[str]) -> dict[str, Any]:
    """The record set of pictures, joined with the table by their file names."""
    pictures = {'fileSet': {'@id': 'images'}}
    fields = [
        _field(
            'file_name',
            'Name of the file in images/',
            'sc:Text',
            {
                'fileObject': {'@id': table},
                'extract': {'column': columns[0]},
                # Readers apply it once or twice.
                'transform': {'regex': '(?:images/)?(.+)'},
            },
        )
    ]
    fields[0]['references'] = {**pictures, 'extract': {'fileProperty': 'filename'}}
    fields.append(
        _field(
            'image',
            'The picture',
            'sc:ImageObject',
            {**pictures, 'extract': {'fileProperty': 'content'}},
        )
    )
    for column in columns[1:]:
        source = {'fileObject': {'@id': table}, 'extract': {'column': column}}
        kind: str | list[str] = 'sc:Float'
        if column == 'label':
            text, kind = 'Majority grade of the group, 0 to 4', ['sc:Integer', 'cr:Label']
        else:
            text = f'Share of grade {column[1:]} in the group'
        fields.append(_field(column, text, kind, source))
    return {
        '@type': 'cr:RecordSet',
        '@id': PICTURES,
        'name': PICTURES,
        'description': 'One record a picture',
        'field': fields,
    }


def _field(
    name: str, description: str, kind: str | list[str], source: dict[str, Any]
) -> dict[str, Any]:
    return {
        '@type': 'cr:Field',
        '@id': f'{PICTURES}/{name}',
        'name': name,
        'description': description,
        'dataType': kind,
        'source': source,
    }


def _grades(names: tuple[str, ...]) -> dict[str, Any]:
    grade, name = f'{GRADES}/grade', f'{GRADES}/name'
    fields = [
        {'@type': 'cr:Field', '@id': grade, 'name': 'grade', 'dataType': 'sc:Integer'},
        {'@type': 'cr:Field', '@id': name, 'name': 'name', 'dataType': 'sc:Text'},
    ]
    return {
        '@type': 'cr:RecordSet',
        '@id': GRADES,
        'name': GRADES,
        'description': 'What the grades mean: international scale for diabetic retinopathy',
        'dataType': 'sc:Enumeration',
        'key': {'@id': grade},
        'field': fields,
        'data': [{grade: number, name: text} for number, text in enumerate(names)],
    }
