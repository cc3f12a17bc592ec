"""Where published texts and benchmarks are fetched from, as data: addresses, sizes, sha256, licences.

A sha256 is that of the file behind the address, from the place that `pinned` names. Where none is
known it is None: then the first download is trusted and recorded, and later ones must equal it.
"""

import dataclasses

HUB_INFOS = 'dataset_infos.json of huggingface/datasets'
TFDS = 'checksums of TensorFlow Datasets 4.9.10'


@dataclasses.dataclass(frozen=True)
class Source:
  """A published file.

  Attributes:
    file: the name it has.
    urls: copies of it, to be tried in this order; none where no program may fetch it.
    size: bytes, where known.
    licence: its name, or the page that states it.
    steps: what a human does to have it, where `urls` can't serve.
  """

  file: str
  urls: tuple[str, ...]
  size: int | None
  sha256: str | None
  pinned: str
  licence: str
  steps: str = ''


def _wikitext(name: str, size: int, sha256: str, *more: str) -> Source:
  return Source(
    f'{name}.zip',
    (
      f'https://wikitext.smerity.com/{name}.zip',
      *more,
      f'https://s3.amazonaws.com/research.metamind.io/wikitext/{name}.zip',
    ),
    size,
    sha256,
    HUB_INFOS,
    'CC BY-SA',
  )


WIKITEXT_2 = _wikitext(
  'wikitext-2-raw-v1',
  4_721_645,
  'ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11',
  'https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip',
)
WIKITEXT_103 = _wikitext(
  'wikitext-103-raw-v1',
  191_984_949,
  '91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794',
)
PTB = Source(
  'ptb.test.txt',
  (),
  449_945,
  'dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0',
  HUB_INFOS,
  'LDC User Agreement (LDC99T42)',
  'the Penn Treebank belongs to the Linguistic Data Consortium: get LDC99T42 from '
  'https://catalog.ldc.upenn.edu/LDC99T42, or, if your licence covers it, the files '
  'ptb.{train,valid,test}.txt that were made of it for language models',
)
ENWIK8 = Source(
  'enwik8.zip',
  ('https://mattmahoney.net/dc/enwik8.zip', 'http://mattmahoney.net/dc/enwik8.zip'),
  36_445_475,
  '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc',
  HUB_INFOS,
  'see http://mattmahoney.net/dc/textdata.html',
)
TEXT8 = Source(
  'text8.zip',
  ('https://mattmahoney.net/dc/text8.zip', 'http://mattmahoney.net/dc/text8.zip'),
  31_344_016,
  'a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232',
  'several public programs that check it',
  'see http://mattmahoney.net/dc/textdata.html',
)
LM1B = Source(
  '1-billion-word-language-modeling-benchmark-r13output.tar.gz',
  ('http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz',),
  1_792_209_805,
  '01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e',
  TFDS,
  'see http://www.statmt.org/lm-benchmark/',
)
CBT = Source(
  'CBTest.tgz',
  (
    'https://huggingface.co/datasets/cbt/resolve/'
    '7503a0643517afe02a86e4750d375a9686008efa/data/CBTest.tgz',
    'http://www.thespermwhale.com/jaseweston/babi/CBTest.tgz',
  ),
  120_547_669,
  '932df0cadc1337b2a12b4c696b1041c1d1c6d4b6bd319874c6288f02e4a61e92',
  HUB_INFOS,
  'GNU Free Documentation License 1.3',
)
LAMBADA = Source(
  'lambada_test.jsonl',
  ('https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl',),
  1_819_752,
  '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226',
  'lm-evaluation-harness',
  'CC BY 4.0',
)
HELLASWAG = Source(
  'hellaswag_val.jsonl',
  ('https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl',),
  12_246_618,
  '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588',
  TFDS,
  'MIT',
)
WINOGRANDE = Source(
  'winogrande_1.1.zip',
  ('https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip',),
  3_395_492,
  '3619ab104d8be2977b25c90ff420cb42d491707dcc75362a1e5d22bc082b7318',
  TFDS,
  'see https://winogrande.allenai.org/',
)
WSC = Source(
  'WSCollection.xml',
  (
    'https://cs.nyu.edu/~davise/papers/WinogradSchemas/WSCollection.xml',
    'https://cs.nyu.edu/faculty/davise/papers/WinogradSchemas/WSCollection.xml',
  ),
  113_235,
  '98c845a5b33c109f2c49742e726fac592bbb1fdc3b3706b604de12f9c9f58c91',
  HUB_INFOS,
  'see https://cs.nyu.edu/faculty/davise/papers/WinogradSchemas/WS.html',
)
CROWS_PAIRS = Source(
  'crows_pairs_anonymized.csv',
  ('https://raw.githubusercontent.com/nyu-mll/crows-pairs/master/data/crows_pairs_anonymized.csv',),
  437_764,
  'dfb36986ce0502abbaf7055b9176da3d08d48e07df1251991b5dfbcbceab9d0c',
  HUB_INFOS,
  'see https://github.com/nyu-mll/crows-pairs',
)
WINOBIAS = tuple(
  Source(
    name,
    ('https://raw.githubusercontent.com/uclanlp/corefBias/master/WinoBias/wino/data/' + name,),
    None,
    None,
    'nowhere: trusted on first use',
    'MIT',
  )
  for name in (
    f'{side}_stereotyped_type{kind}.txt.test' for kind in (1, 2) for side in ('pro', 'anti')
  )
)
OPENWEBTEXT = Source(
  'openwebtext.tar.xz',
  ('https://zenodo.org/record/3834942/files/openwebtext.tar.xz',),
  12_880_027_468,
  '9fe39d154c5bc67da8c359415372b79510eb1e2edb0d035fe4f7fc3a732b9336',
  HUB_INFOS,
  'see https://skylion007.github.io/OpenWebTextCorpus/',
)
