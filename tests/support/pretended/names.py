"""PyTorch's names of the operations that matter to a GPU."""

# These take a 0-d tensor of the CPU beside tensors of the GPU, as a number.
TAKE_NUMBERS = {
    name + suffix
    for suffix in ('', '_')
    for name in (
        'add',
        'sub',
        'mul',
        'div',
        'where',
        'lt',
        'le',
        'gt',
        'ge',
        'eq',
        'ne',
        'pow',
        'rsub',
        'maximum',
        'minimum',
        'lerp',
        'addcmul',
        'addcdiv',
        'fill',
        'masked_fill',
        'atan2',
        'clamp',
        'clamp_min',
        'clamp_max',
        'remainder',
        'copysign',
        '_foreach_mul',
        '_foreach_div',
        'logical_and',
        'bitwise_and',
    )
}
# The host waits for their result, whose shape or value it needs.
WAIT = {
    'nonzero',
    'masked_select',
    '_local_scalar_dense',
    '_unique2',
    'unique_dim',
    'equal',
    'unique_consecutive',
    'is_nonzero',
    'bincount',
}
# These refuse tensors of several types.
ONE_DTYPE = {'convolution', 'convolution_backward', 'mm', 'bmm', 'addmm', 'baddbmm'}
FACTORIES = {
    'empty',
    'zeros',
    'ones',
    'full',
    'rand',
    'randn',
    'randint',
    'randperm',
    'arange',
    'linspace',
    'logspace',
    'eye',
    'tensor',
    'as_tensor',
    'empty_strided',
    'frombuffer',
    'scalar_tensor',
    'hann_window',
    'tril_indices',
    'triu_indices',
}
DRAWS = {
    'randn',
    'rand',
    'randint',
    'randperm',
    'normal_',
    'uniform_',
    'bernoulli',
    'random_',
    'multinomial',
    'randn_like',
    'rand_like',
}
