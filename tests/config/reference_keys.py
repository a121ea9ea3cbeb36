"""Every key of DeepSpeed's configuration, as an indented outline, with the defaults it documents.

A line is a key, optionally `= default` in JSON; indentation is nesting; `*` is any name and `[]`
the items of a list.
"""

OUTLINE = """
train_batch_size = null
train_micro_batch_size_per_gpu = null
gradient_accumulation_steps = null
managed_gradient_accumulation = true
optimizer
  type
  params
  legacy_fusion = false
scheduler
  type
  params
steps_per_print = null
dump_state = false
wall_clock_breakdown = false
memory_breakdown = false
disable_allgather = false
communication_data_type = null
seq_parallel_communication_data_type = "fp32"
prescale_gradients = false
gradient_predivide_factor = 1.0
gradient_allreduce_op = "mean"
sparse_gradients = false
gradient_clipping = 1.0
zero_allow_untested_optimizer = false
zero_force_ds_cpu_optimizer = true
graph_harvesting = false
use_data_before_expert_parallelism = false
dataloader_drop_last = false
vocabulary_size = null
sequence_parallel_size
data_parallel_size
log_level = null
pipeline_parallelism
  num_stages
tensor_model_parallel_size
zero_optimization
  stage = 0
  contiguous_gradients = true
  reduce_scatter = true
  reduce_bucket_size = 5e8
  use_multi_rank_bucket_allreduce = true
  allgather_partitions = true
  allgather_bucket_size = 5e8
  overlap_comm = null
  load_from_fp32_weights = true
  elastic_checkpoint = false
  sub_group_size = 1e9
  stage3_max_live_parameters = 1e9
  stage3_max_reuse_distance = 1e9
  stage3_prefetch_bucket_size = 5e7
  stage3_param_persistence_threshold = 1e5
  stage3_model_persistence_threshold = 9223372036854775807
  stage3_gather_16bit_weights_on_model_save = false
  stage3_module_granularity_threshold = 0
  stage3_use_all_reduce_for_fetch_params = false
  stage3_allgather_sequential = false
  ignore_unused_parameters = true
  legacy_stage1 = false
  round_robin_gradients = false
  zero_hpz_partition_size = 1
  zero_quantized_weights = false
  zero_quantized_nontrainable_weights = false
  zero_quantized_gradients = false
  zeropp_loco_param
    err_beta = 0.8
    reset_T = 1024
  mics_shard_size = -1
  mics_hierarchical_params_gather = false
  memory_efficient_linear = true
  pipeline_loading_checkpoint = false
  override_module_apply = true
  log_trace_cache_warnings = false
  enable_sanity_checks = false
  save_muon_momentum_buffer_in_memory = false
  leaf_module
    classes
    names
    name_suffixes
  offload_param
    device = "none"
    nvme_path = null
    buffer_count = 5
    buffer_size = 1e8
    max_in_cpu = 1e9
    pin_memory = true
  offload_optimizer
    device = "none"
    nvme_path = null
    buffer_count = 4
    pin_memory = true
    pipeline_read = false
    pipeline_write = false
    fast_init = false
    ratio = 1.0
    super_offload = false
    cpuadam_cores_perc = 0.8
  zenflow = null
    topk_ratio = 0.1
    select_strategy = "auto"
    select_interval = "auto"
    update_interval = "auto"
    overlap_step = false
    offload = false
    auto_ratio = 0.99
    full_warm_up_rounds = 0
    pt_reserved_cores_perc = 0.5
    steps_per_epoch
  cpu_offload
  cpu_offload_param
  cpu_offload_use_pin_memory
  stage3_gather_fp16_weights_on_model_save
fp16
  enabled = false
  auto_cast = false
  loss_scale = 0
  initial_scale_power = 16
  loss_scale_window = 1000
  hysteresis = 2
  consecutive_hysteresis = false
  min_loss_scale = 1
  fp16_master_weights_and_grads = false
bf16
  enabled = false
  immediate_grad_update = false
  check_grad_overflow = true
  bf16_master_weights_and_grads = false
  bf16_optimizer_states = false
bfloat16
  enabled
data_types
  grad_accum_dtype = null
  param_dtype = null
  buffer_dtype = null
torch_autocast
  enabled = false
  dtype
  lower_precision_safe_modules = null
amp
  enabled = false
  *
activation_checkpointing
  partition_activations = false
  number_checkpoints = null
  contiguous_memory_optimization = false
  synchronize_checkpoint_boundary = false
  profile = false
  cpu_checkpointing = false
pipeline
  stages = "auto"
  partition = "best"
  seed_layers = false
  activation_checkpoint_interval = 0
  pipe_partitioned = true
  grad_partitioned = true
  use_reentrant = true
sparse_attention
  mode = "fixed"
  block = 16
  different_layout_per_head = false
  num_local_blocks = 4
  num_global_blocks = 1
  attention = "bidirectional"
  horizontal_global_attention = false
  num_different_global_patterns = 1
  num_random_blocks = 0
  local_window_blocks = [4]
  global_block_indices = [0]
  global_block_end_indices = null
  num_sliding_window_blocks = 3
hybrid_engine
  enabled = false
  max_out_tokens = 512
  inference_tp_size = 1
  release_inference_cache = false
  pin_parameters = true
  tp_gather_partition_size = 8
  enable_cuda_graph = false
tensor_parallel
  autotp_size = 0
  preset_model = null
  partition_config
    use_default_specs
    layer_specs[]
      patterns
      partition_type
      shape
      partition_dim
      model_types
      gather_output
      grad_allreduce
  tp_overlap_comm = false
  dtype = "fp16"
  tp
    tp_size = 1
    tp_grain_size = 1
  keep_module_on_host = false
expert_parallel
  enabled = false
  autoep_size = 1
  expert_tensor_parallel_size = 1
  preset_model = null
  moe_layer_pattern = null
  router_pattern = null
  expert_pattern = null
  use_grouped_mm = true
  disable_triton_grouped_mm = false
  route_norm = null
  route_scale = 1.0
  score_func = "auto"
  score_apply = "auto"
  top_k = "auto"
  combine_impl = "auto"
  num_expert_groups = null
  num_limited_groups = null
  load_balance_coeff = null
  routed_scaling_factor = "auto"
  expert_w1 = null
  expert_w2 = null
  expert_w3
  num_experts_attr = null
  top_k_attr = null
  has_shared_experts = null
  shared_experts_pattern = null
  validate_folding_routing = false
compile
  deepcompile = false
  free_activation = false
  free_activation_threshold = 10485760
  offload_activation = false
  offload_activation_pin_memory = true
  offload_opt_states = false
  double_buffer = true
  symmetric_memory = false
  debug_log = false
  offload_parameters = false
  sync_before_reduce = false
  sync_after_reduce = false
  sync_before_allgather = false
  sync_after_allgather = false
  keep_int_input_tensors = true
  keep_all_input_tensors = false
  passes = null
progressive_layer_drop
  enabled = false
  theta = 1.0
  gamma = 0.001
curriculum_learning
  enabled = false
  curriculum_type
  min_difficulty
  max_difficulty
  schedule_type
  schedule_config
    total_curriculum_step
    difficulty_step
    root_degree
    difficulty
    max_step
data_efficiency
  enabled = false
  seed = 1234
  data_sampling
    enabled = false
    num_epochs = 1000
    num_workers = 0
    pin_memory = false
    curriculum_learning
      enabled = false
      data_cluster_path
      curriculum_metrics
        *
          index_to_sample_path
          index_to_metric_path
          difficulty_type
          clustering_type
          min_difficulty
          max_difficulty
          schedule_type
          schedule_config
            total_curriculum_step
            difficulty_step
            root_degree
            difficulty
            max_step
    dynamic_batching
      enabled = false
      lr_scaling_method = "linear"
      min_batch_size = 1
      max_batch_size = null
      sequence_picking_order = "dataloader"
      max_tokens
      metrics_path
      verbose
  data_routing
    enabled = false
    random_ltd
      enabled = false
      total_layer_num
      random_ltd_layer_num
      random_ltd_layer_id
      model_mask_name
      model_type
      hidden_state_order
      random_ltd_schedule
        min_value
        max_value
        schedule_type
        schedule_config
          require_steps
          seq_per_step
      layer_token_lr_schedule
        enabled = false
compression_training
  weight_quantization
    shared_parameters
      enabled = false
      quantizer_kernel = false
      schedule_offset = 0
      quantize_groups = 1
      quantize_verbose = false
      quantization_type = "symmetric"
      rounding = "nearest"
      quantize_weight_in_forward = false
      fp16_mixed_quantize
        enabled = false
        quantize_change_ratio = 0.001
    different_groups
      *
        params
          start_bits
          target_bits
          quantization_period = 1
        modules
        related_modules
  activation_quantization
    shared_parameters
      enabled = false
      quantization_type = "symmetric"
      range_calibration = "dynamic"
      schedule_offset = 1000
    different_groups
      *
        params
          bits
        modules
        related_modules
  sparse_pruning
    shared_parameters
      enabled = false
      method
      schedule_offset = 1000
      schedule_offset_end
      schedule_offset_stride = 1
      block_pattern = "4x1"
      dense_ratio = 0.1
      excluded_modules
    different_groups
      *
        params
          dense_ratio
        modules
        related_modules
  row_pruning
    shared_parameters
      enabled = false
      method
      schedule_offset
    different_groups
      *
        params
          dense_ratio
        modules
        related_modules
  head_pruning
    shared_parameters
      enabled = false
      method
      schedule_offset
      num_heads
    different_groups
      *
        params
          dense_ratio
        modules
        related_modules
  channel_pruning
    shared_parameters
      enabled = false
      method
      schedule_offset
    different_groups
      *
        params
          dense_ratio
        modules
        related_modules
  layer_reduction
    enabled = false
    keep_number_layer
    module_name_prefix
    teacher_layer
    other_module_name
eigenvalue
  enabled = false
  verbose = false
  max_iter = 100
  tol = 0.01
  stability = 1e-6
  gas_boundary_resolution = 1
  layer_name = "bert.encoder.layer"
  layer_num = 0
quantize_training
  enabled
  *
weight_quantization = null
  quantized_initialization
    num_bits
    group_size
    group_dim
    symmetric
  post_init_quant
    *
      num_bits
      group_size
      group_dim
      symmetric
aio
  block_size = 1048576
  queue_depth = 8
  intra_op_parallelism = 1
  thread_count
  single_submit = false
  overlap_events = true
  use_gds = false
checkpoint
  tag_validation = "Warn"
  load_universal = false
  use_node_local_storage = false
  parallel_write
    pipeline_stage = false
  checkpoint_serialization = true
  writer
    type = "FAST"
    io_buffer_size = 67108864
    io_buffer_double = true
    show_statistics = false
    data_parallel = null
    decoupled = false
    io_multiplier = 1
nebula
  enabled = false
  persistent_storage_path = null
  persistent_time_interval = 100
  num_of_version_in_retention = 2
  enable_nebula_load = true
  nebula_load_path = null
datastates_ckpt
  host_cache_size
flops_profiler
  enabled = false
  recompute_fwd_factor = 0.0
  profile_step = 1
  module_depth = -1
  top_modules = 1
  detailed = true
  output_file = null
comms_logger
  enabled = false
  prof_all = true
  prof_ops = []
  verbose = false
  debug = false
timers
  throughput
    enabled = true
    synchronized = true
tensorboard
  enabled = false
  output_path = ""
  job_name = "DeepSpeedJobName"
csv_monitor
  enabled = false
  output_path = ""
  job_name = "DeepSpeedJobName"
wandb
  enabled = false
  group = null
  team = null
  project = "deepspeed"
comet
  enabled = false
  samples_log_interval = 100
  project = null
  workspace = null
  api_key = null
  experiment_name = null
  experiment_key = null
  online = null
  mode = null
autotuning
  enabled = false
  fast = true
  results_dir = "autotuning_results"
  exps_dir = "autotuning_exps"
  overwrite = true
  start_profile_step = 3
  end_profile_step = 5
  metric = "throughput"
  metric_path = null
  tuner_type = "gridsearch"
  tuner_early_stopping = 5
  tuner_num_trials = 50
  arg_mappings
  model_info
    profile = false
    num_params = null
    hidden_size = null
    num_layers = null
  model_info_path = null
  mp_size = 1
  max_train_batch_size = null
  min_train_batch_size = 1
  max_train_micro_batch_size_per_gpu = 1024
  min_train_micro_batch_size_per_gpu = 1
  num_tuning_micro_batch_sizes = 3
elasticity
  enabled = false
  max_train_batch_size = 2000
  micro_batch_sizes = [2, 4, 6]
  min_gpus = 1
  max_gpus = 10000
  num_gpus_per_node = 1
  model_parallel_size = 1
  min_time = 0
  prefer_larger_batch = true
  prefer_large_batch
  ignore_non_elastic_batch_info = false
  version = 0.2
"""

OPTIMIZER_PARAMS = """
Adam lr=1e-3 betas=[0.9,0.999] eps=1e-8 weight_decay=0.0 bias_correction=true adam_w_mode=true
AdamW lr=1e-3 betas=[0.9,0.999] eps=1e-8 weight_decay=0.0 bias_correction=true adam_w_mode=true
FusedAdam lr=1e-3 betas=[0.9,0.999] eps=1e-8 weight_decay=0.0 bias_correction=true adam_w_mode=true
Lamb lr=1e-3 betas=[0.9,0.999] eps=1e-8 weight_decay=0.0 max_coeff=10.0 min_coeff=0.01
Lion lr=1e-3 betas=[0.9,0.999] weight_decay=0.0
Adagrad lr=1e-2 eps=1e-10 weight_decay=0.0
SGD lr=1e-3 momentum=0.0 dampening=0.0 weight_decay=0.0 nesterov=false
Muon muon_lr=0.02 adam_lr=3e-4 momentum=0.95 betas=[0.9,0.95] eps=1e-10 weight_decay=0.0
OneBitAdam lr=1e-3 freeze_step=100000 cuda_aware=false comm_backend_name="nccl"
ZeroOneAdam var_freeze_step=100000 var_update_scaler=16 local_step_scaler=32678
OneBitLamb freeze_step=100000 coeff_beta=0.9 factor_max=4.0 factor_min=0.5 factor_threshold=0.1
MuAdam lr=1e-3
MuAdamW lr=1e-3
MuSGD lr=1e-3
"""

SCHEDULER_PARAMS = """
LRRangeTest lr_range_test_min_lr=1e-3 lr_range_test_step_size=2000 lr_range_test_step_rate=1.0
OneCycle decay_lr_rate=0.0 cycle_first_step_size=2000 cycle_momentum=true cycle_min_mom=0.8
WarmupLR warmup_min_lr=0.0 warmup_max_lr=null warmup_num_steps=1000 warmup_type="log"
WarmupDecayLR warmup_min_lr=0.0 warmup_max_lr=1e-3 warmup_num_steps=1000 warmup_type="log"
WarmupCosineLR warmup_min_ratio=0.0 cos_min_ratio=1e-4 warmup_num_steps=1000 warmup_type="log"
"""
