"""Text to batches: corpora, tokenizers, packed windows in TFDS, grain pipelines.

``config`` says what is wanted, ``corpora`` reads documents, ``tokenizers`` turns them into ids, ``packing`` cuts the
stream of ids into windows, ``builders`` stores those as a TFDS dataset, and ``pipeline`` does all of it in one call,
``prepare``, then hands out batches; ``ramp`` makes these grow, ``mixture`` mixes the text with tasks. ``masking``,
``spans``, ``denoising`` and ``pairs`` are what pretraining objectives do to a window or a document, drawn from the
generators of ``corruption``. Nothing here imports jax or TensorFlow: a batch is a dict of NumPy arrays.
"""
