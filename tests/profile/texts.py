"""Compiled programs in miniature, in the forms that XLA prints, long lines and all."""

# ruff: noqa: E501

LOOP = """HloModule step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_next (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %sum = s32[] add(%p, %two), metadata={op_name="jit(step)/add"}
}

%body (param: (s32[], bf16[4,8], bf16[32,8])) -> (s32[], bf16[4,8], bf16[32,8]) {
  %param = (s32[], bf16[4,8]{1,0}, /*index=2*/bf16[32,8]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%param), index=0
  %shard = bf16[4,8]{1,0} get-tuple-element(%param), index=1
  %bias = bf16[2]{0} constant({0, 0})
  %ag-start = ((bf16[4,8]{1,0}, bf16[2]{0}), (bf16[32,8]{1,0}, bf16[16]{0})) all-gather-start(%shard, %bias), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, metadata={op_name="jit(step)/while/body/(gather.w/all_gather:gather.b/all_gather)"}, backend_config={"collective_backend_config":{"is_sync":false}}
  %x = f32[8]{0} constant({0})
  %product = (f32[8]{0}, s8[64]{0}) custom-call(%x), custom_call_target="__cublas$lt$matmul"
  %ag-done = (bf16[32,8]{1,0}, bf16[16]{0}) all-gather-done(%ag-start)
  %whole = bf16[32,8]{1,0} get-tuple-element(%ag-done), index=0
  %next = s32[] fusion(%index), kind=kLoop, calls=%fused_next
  ROOT %out = (s32[], bf16[4,8]{1,0}, bf16[32,8]{1,0}) tuple(%next, %shard, %whole)
}

%fused_less (q: s32[]) -> pred[] {
  %q = s32[] parameter(0)
  %limit = s32[] constant(15)
  ROOT %less = pred[] compare(%q, %limit), direction=LT
}

%condition (cond_param: (s32[], bf16[4,8], bf16[32,8])) -> pred[] {
  %cond_param = (s32[], bf16[4,8]{1,0}, bf16[32,8]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%cond_param), index=0
  ROOT %more = pred[] fusion(%counter), kind=kLoop, calls=%fused_less
}

ENTRY %main (a: bf16[4,8], b: bf16[32,8]) -> bf16[32,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[32,8]{1,0} parameter(1)
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %init = (s32[], bf16[4,8]{1,0}, bf16[32,8]{1,0}) tuple(%start, %a, %b)
  %loop = (s32[], bf16[4,8]{1,0}, bf16[32,8]{1,0}) while(%init), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}LOOP_NOTE
  ROOT %result = bf16[32,8]{1,0} get-tuple-element(%loop), index=2
}
"""

ASYNC = """HloModule step, is_scheduled=true

%add (l: bf16[], r: bf16[]) -> bf16[] {
  %l = bf16[] parameter(0)
  %r = bf16[] parameter(1)
  ROOT %s = bf16[] add(%l, %r)
}

%async_computation (g: f32[32,8]) -> f32[4,8] {
  %g = f32[32,8]{1,0} parameter(0)
  ROOT %rs = f32[4,8]{1,0} reduce-scatter(%g), channel_id=2, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}, to_apply=%add
}

%matmuls (m: f32[8]) -> f32[8] {
  %m = f32[8]{0} parameter(0)
  ROOT %inner = f32[8]{0} dot(%m, %m), lhs_contracting_dims={0}
}

ENTRY %main (a: f32[32,8], v: f32[8]) -> f32[4,8] {
  %a = f32[32,8]{1,0} parameter(0)
  %v = f32[8]{0} parameter(1)
  %start = ((f32[32,8]{1,0}), f32[4,8]{1,0}, u32[]) async-start(%a), calls=%async_computation
  %called = f32[8]{0} call(%v), to_apply=%matmuls
  %plain = f32[8]{0} negate(%v)
  %middle = ((f32[32,8]{1,0}), f32[4,8]{1,0}, u32[]) async-update(%start)
  %done = f32[4,8]{1,0} async-done(%middle)
  %late = f32[8]{0} dot(%v, %v), lhs_contracting_dims={0}
  %ar = f32[8]{0} all-reduce-start(%v), replica_groups=[4,2]<=[8], to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  %ar-done = f32[8]{0} all-reduce-done(%ar)
  %moved = f32[8]{0} collective-permute(%v), source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  ROOT %out = f32[4,8]{1,0} copy(%done)
}
"""

PIPELINE = """HloModule step, is_scheduled=true

%idle (i: (bf16[1024,1024])) -> (bf16[1024,1024]) {
  ROOT %i = (bf16[1024,1024]{1,0}) parameter(0)
}

%layers (w: (bf16[1024,1024])) -> (bf16[1024,1024]) {
  %w = (bf16[1024,1024]{1,0}) parameter(0)
  %h = bf16[1024,1024]{1,0} get-tuple-element(%w), index=0
  %product = bf16[1024,1024]{1,0} custom-call(%h, %h), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %gathered = bf16[4096,1024]{1,0} all-gather(%product), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %done = (bf16[1024,1024]{1,0}) tuple(%product)
}

%operation (table: s32[3,1,2,12], turn: s32[], stage: s32[]) -> s32[] {
  %table = s32[3,1,2,12]{3,2,1,0} parameter(0)
  %turn = s32[] parameter(1)
  %stage = s32[] parameter(2)
  %none = s32[] constant(0)
  %cell = s32[1,1,1,12]{3,2,1,0} dynamic-slice(%table, %turn, %none, %stage, %none), dynamic_slice_sizes={1,1,1,12}
  %field = s32[1,1,1,1]{3,2,1,0} slice(%cell), slice={[0:1], [0:1], [0:1], [0:1]}
  ROOT %op = s32[] bitcast(%field)
}

%body (param: (s32[], bf16[1024,1024], s32[])) -> (s32[], bf16[1024,1024], s32[]) {
  %param = (s32[], bf16[1024,1024]{1,0}, s32[]) parameter(0)
  %index = s32[] get-tuple-element(%param), index=0
  %x = bf16[1024,1024]{1,0} get-tuple-element(%param), index=1
  %mine = s32[] get-tuple-element(%param), index=2
  %permute-start = (bf16[1024,1024]{1,0}, bf16[1024,1024]{1,0}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,4},{1,5},{2,6},{3,7}}
  %permute-done = bf16[1024,1024]{1,0} collective-permute-done(%permute-start)
  %cells = s32[3,1,2,12]{3,2,1,0} constant({...})
  %what = s32[] fusion(%cells, %index, %mine), kind=kLoop, calls=%operation
  %into = (bf16[1024,1024]{1,0}) tuple(%permute-done)
  %switch = (bf16[1024,1024]{1,0}) conditional(%what, %into, %into), branch_computations={%idle, %layers}
  %out = bf16[1024,1024]{1,0} get-tuple-element(%switch), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%index, %one)
  ROOT %state = (s32[], bf16[1024,1024]{1,0}, s32[]) tuple(%next, %out, %mine)
}

%condition (c: (s32[], bf16[1024,1024], s32[])) -> pred[] {
  %c = (s32[], bf16[1024,1024]{1,0}, s32[]) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(3)
  ROOT %more = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (a: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %device = u32[] partition-id()
  %two = u32[] constant(2)
  %axis = u32[] shift-right-logical(%device, %two)
  %pipe = s32[] convert(%axis)
  %init = (s32[], bf16[1024,1024]{1,0}, s32[]) tuple(%zero, %a, %pipe)
  %loop = (s32[], bf16[1024,1024]{1,0}, s32[]) while(%init), condition=%condition, body=%body
  ROOT %result = bf16[1024,1024]{1,0} get-tuple-element(%loop), index=1
}
"""
"""Two stages, each of four devices, that pass microbatches forward in three turns."""
