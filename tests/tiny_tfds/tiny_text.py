"""A dataset of TensorFlow Datasets, as a user might have one."""

import tensorflow_datasets as tfds


class TinyText(tfds.core.GeneratorBasedBuilder):
  """Fifty made-up texts."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({'text': tfds.features.Text()})
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(50):
      yield i, {'text': f'text number {i} ' * 5}
