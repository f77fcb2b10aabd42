OVERRIDES = dict(
    hunyuan_v1_dense=dict(head_dim=128), hunyuan_v1_moe=dict(head_dim=128), ministral=dict(head_dim=128),
    nemotron=dict(num_key_value_heads=8), lfm2_moe=dict(layer_types=["conv","full_attention"]*16),
    cohere_compass_text=dict(rope_parameters={k:dict(rope_type="default",rope_theta=1e4) for k in ("full_attention","sliding_attention")}),
    dots1=dict(n_routed_experts=8,n_shared_experts=1,num_experts_per_tok=2),
    deepseek_v2=dict(num_experts_per_tok=2,topk_group=1,n_group=1),
    dbrx=dict(attn_config=dict(rope_theta=1e4)),
)
