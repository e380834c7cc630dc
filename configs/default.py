"""Every key of a config, with what it means. Other files start from here.

The numbers are those of a small text model; `{}` in a comment is the key that
a value follows until it is set on its own.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
  if arg:
    raise ValueError(f'configs/default.py takes no argument, not {arg!r}')
  c = ConfigDict()
  c.model = m = ConfigDict()
  m.vocab_size = 259  # 256 bytes and 3 reserved: 0 PAD, 1 EOS, 2 SOS
  m.context_length = 2048  # M: inputs that the latents may attend to
  m.num_latents = 512  # N: the last inputs, each predicts its next token
  m.num_layers = 6  # L: self-attention layers after the cross-attend
  m.width = 256  # D: of the latents
  m.embed_width = m.get_oneway_ref('width')  # E: of the inputs {width}
  m.num_cross_heads = 8  # must divide embed_width
  m.num_self_heads = 8  # must divide width
  m.cross_mlp_width = 4 * m.get_oneway_ref('width')  # {4 * width}
  m.mlp_width = 4 * m.get_oneway_ref('width')  # {4 * width}
  m.activation = 'sq_relu'  # relu(x)**2, or relu, gelu, silu, ...
  m.position_encoding = 'rotary'  # rotary, sinusoidal, learned
  m.position_source = 'data'  # data, from_end, from_end_negated
  m.position_sizes = (0,)  # ids per position axis; 0: no limit (not learned)
  m.rotary_fraction = 0.5  # of the channels of a head that are rotated
  m.rotary_head_fraction = 1.0  # of the heads that are rotated
  m.rotary_max_wavelength = m.get_oneway_ref('context_length')
  m.dropout_rate = 0.1  # on the output of attention and of the MLP
  m.input_dropout_rate = 0.0  # inputs hidden from the cross-attend, by a mask
  m.num_kept_inputs = 0  # or: so many kept, the rest never computed; 0: all
  m.dtype = 'float32'  # of compute: float32, bfloat16
  # Of parameters, where they rest: float32, bfloat16. There is no other copy:
  # an update below 1/256 of a bfloat16 value is lost.
  m.param_dtype = 'float32'
  # Of a layer, kept for the backward pass: none recomputes nothing; dots keeps
  # matmuls; attention keeps its output (of flash and chunked); full keeps only
  # what it takes in; offload keeps that in the memory of the host.
  m.remat = 'none'
  m.scan_unroll = 1  # layers per step of the scan over layers
  # auto: flash on TPU, cudnn on GPU in bfloat16, else chunked; or one of these,
  # or reference. Sampling from a cache is chunked or reference.
  m.attention = 'auto'
  m.attention_block = 512  # keys per block of chunked attention
  # Keys and values of the cross-attend computed once per vocabulary entry:
  # auto does so where there are fewer of these than inputs on a device.
  m.token_table = 'auto'  # auto, always, never; needs rotary positions
  m.logits_block = 0  # latents of a row whose logits exist at a time; 0: all

  c.data = d = ConfigDict()
  d.kind = 'prepared'  # or copy: mirrored noise, generated
  d.path = ''  # the folder that a tools/prepare_*.py wrote
  d.visits = 'by_length'  # of a document in an epoch: once, or by its length
  d.min_crop = m.get_oneway_ref('num_latents')  # fewest inputs of a crop
  # At a record that is not what was written: stop, or skip it in training: read
  # another in its place, and count it (bad_records in metrics.jsonl).
  d.damaged = 'stop'
  d.copy_length = 0  # of a copy sequence, SOS and EOS included
  d.copy_offset = 0  # added to its positions, which begin at 1
  d.num_eval_documents = 0  # copy sequences in the validation split
  d.num_read_threads = 2
  d.prefetch = 16  # rows read ahead
  d.device_prefetch = 1  # batches placed on the devices ahead

  c.train = t = ConfigDict()
  t.num_steps = 10_000
  t.batch_size = 8  # sequences per step, over all devices
  t.num_microbatches = 1  # parts of the batch that are computed in turn
  # Gradients of several cross the mesh when all are done, for which a device
  # has room for whole ones, and whole parameters, even with FSDP.
  t.reduce_gradients_once = True
  t.seed = 1
  t.z_loss = 1e-4  # times log(Z)**2, keeps logits near normalised
  t.label_smoothing = 0.0
  # A step that is not finite is skipped, and one whose loss per target is so
  # many standard deviations above the mean of the last ones; 0: never.
  t.spike_deviations = 0.0
  t.max_skipped_steps = 10  # in a row before the run stops
  # What a step, a save or a batch of an evaluation may take before the run ends
  # to be started again, if that is 10 times what it usually takes; 0: for ever.
  t.hang_seconds = 300.0
  t.log_every = 10  # steps that the loss on the screen is the mean of
  t.check_memory = True  # on TPU, refuse a step that does not fit a device
  # Steps after which what several devices hold alike is compared, and at every
  # save: other bits are silent corruption, and end the run; 0: never.
  t.check_replicas_every = 1_000

  c.optimizer = o = ConfigDict()
  o.name = 'adam'  # adam, adamw, adafactor, sgd, lamb
  o.learning_rate = 3e-4
  o.schedule = 'constant'  # after warm-up: constant, cosine, steps, rsqrt
  o.warmup_steps = 1_000  # linear from 0
  o.decay_start = o.get_oneway_ref('warmup_steps')  # where cosine begins
  o.decay_end = t.get_oneway_ref('num_steps')  # where cosine, steps end
  o.final_fraction = 0.0  # of the learning rate, where cosine ends
  o.gradient = 'sum'  # what is clipped, over targets: sum (published), mean
  o.clip_norm = 1.0  # global norm; 0: no clipping
  o.b1 = 0.9  # momentum of adam, adamw, lamb and sgd (Nesterov)
  o.b2 = 0.999
  o.eps = 1e-8
  o.weight_decay = 0.0  # adamw, lamb, adafactor: matrices only
  o.momentum_dtype = 'float32'  # of first moments: float32, bfloat16
  o.variance_dtype = 'float32'  # of second ones; bfloat16: b2 up to 0.95
  o.offload = False  # moments rest in the memory of the host

  c.mesh = s = ConfigDict()
  s.slice = 1  # data parallel between slices, over DCN
  s.data = -1  # batch and FSDP; -1: all devices that are left
  s.context = 1  # input positions
  s.model = 1  # tensor parallel
  # Parameters are split over: fsdp: data; tensor: model; fsdp_tensor: both;
  # fsdp_tensor_vocab: the vocabulary, too; context: data, context and model.
  s.rules = 'fsdp_tensor'  # or replicated

  c.checkpoint = k = ConfigDict()
  k.init_from = ''  # another run's workdir: begin with its parameters
  k.save_every = 500  # steps
  k.save_minutes = 0.0  # besides; it goes when the next is there; 0: never
  k.keep_latest = 2  # of those of `save_every`
  k.keep_best = 1  # by evaluations of steps that are saved
  k.keep_every = 0  # steps, a multiple of save_every; all are kept; 0: none
  # Of the memory of a host, what a process takes to save or restore; a state of
  # more than half of it is saved in parts, while training waits; 0: no limit.
  k.max_host_gb = 64.0

  c.evaluate = e = ConfigDict()
  e.every = 0  # steps; 0: only by the evaluate command
  e.split = 'validation'
  e.batch_size = t.get_oneway_ref('batch_size')
  e.stride = m.get_oneway_ref('num_latents')  # tokens scored per block
  e.num_latents = m.get_oneway_ref('num_latents')  # at test time
  e.context_length = m.get_oneway_ref('context_length')  # at test time
  e.max_examples = 0  # documents scored during training; 0: all

  c.sample = p = ConfigDict()
  p.num_samples = 4
  p.length = 2048  # new tokens of each; an image ends when it is complete
  p.temperature = 1.0  # 0: the likeliest token
  p.top_p = 1.0  # nucleus
  p.top_k = 0  # 0: all
  p.seed = 0
  p.num_latents = m.get_oneway_ref('num_latents')
  p.refill_latents = p.get_oneway_ref('num_latents') // 2
  return c
