"""Which test shows the effect of each option of the proxy, of an edge and of a key."""

from __future__ import annotations

_UPSTREAM = "test_upstream.py::"
_CANARIES = "test_canaries.py"
WHOLE_FILES = (_CANARIES, "test_canary_worker.py")
OPTIONS = {
    "host": "test_host_and_port",
    "port": "test_host_and_port",
    "policy": "test_a_proxy_with_another_policy_than_the_engine_is_not_ready",
    "keys": "test_keys_and_database_say_where_the_files_are",
    "database": "test_keys_and_database_say_where_the_files_are",
    "database_timeout_s": "test_a_locked_database_refuses_handoffs_after_database_timeout_s",
    "store": "test_a_proxy_with_another_store_than_the_engine_is_not_ready",
    "store_timeout_s": "test_proxy_slots.py::test_a_stopped_store_keeps_nobody_else_waiting",
    "store_max_bytes": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "prefix_cache": "test_prefix_cache_is_shared_within_a_tenant_where_the_option_says_so",
    "metrics_auth": "test_metrics_auth",
    "drain_s": "test_a_running_stream_ends_whole_within_drain_s",
    "upstream.url": "test_host_and_port",
    "upstream.api_key_env": "test_a_proxy_without_the_engines_key_is_not_ready",
    "upstream.connect_timeout_s": _UPSTREAM
    + "test_a_server_that_does_not_take_connections_runs_into_connect_timeout_s",
    "upstream.read_timeout_s": _UPSTREAM
    + "test_silence_in_the_middle_of_an_answer_runs_into_read_timeout_s",
    "upstream.total_timeout_s": _UPSTREAM
    + "test_a_trickle_is_no_silence_and_ends_at_total_timeout_s",
    "upstream.retries": _UPSTREAM
    + "test_a_dropped_connection_is_tried_again_as_often_as_the_option_says",
    "limits.max_body_bytes": "test_max_body_bytes",
    "limits.max_output_tokens": "test_proxy_limits.py::test_all_that_one_request_generates_counts",
    "limits.body_timeout_s": "test_body_timeout_s_for_head_and_body",
    "limits.write_timeout_s": "test_proxy_slots.py::"
    "test_a_client_that_does_not_read_loses_its_place",
    "limits.redact_timeout_s": "test_cpu_worker.py::"
    "test_the_loop_goes_on_and_nobody_waits_past_the_deadline",
    "limits.key_concurrency": "test_proxy_slots.py::test_a_key_has_a_limit_without_saying_one",
    "limits.max_concurrency": "test_proxy_slots.py::test_the_line_before_vllm_has_an_end",
    "limits.max_queue": "test_proxy_slots.py::test_the_line_before_vllm_has_an_end",
    "limits.queue_timeout_s": "test_proxy_slots.py::test_who_waits_too_long_for_a_place_is_refused",
    "canaries.enabled": "test_canaries_run_where_they_are_enabled",
    "canaries.interval_s": _CANARIES,
    "canaries.timeout_s": _CANARIES,
    "canaries.threshold": "test_on_leak_refuses_or_redacts_on_a_closed_edge",
    "canaries.train_records": "test_canary_worker.py",
    "canaries.test_records": "test_canary_worker.py",
    "canaries.attack": "test_canary_worker.py",
    "engine.model": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.served_model_name": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.unproven": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.guards": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.untested_vllm": "test_vllm_versions.py::test_the_server_s_option_reaches_its_engine",
    "engine.args": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.nice": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.start_timeout_s": "test_start_timeout_s_and_restarts",
    "engine.restarts": "test_start_timeout_s_and_restarts",
    "engine.restart_window_s": "test_engine_restarts.py::"
    "test_deaths_are_counted_within_a_window_and_none_is_the_last",
}


EDGE_OPTIONS = {
    "source": "test_tenant_source_and_audience_choose_the_rule",
    "audience": "test_tenant_source_and_audience_choose_the_rule",
    "tenant": "test_tenant_source_and_audience_choose_the_rule",
    "forbid": "test_forbid_and_guard",
    "declassify": "test_proxy_lineage.py::test_declassifying_is_in_the_audit",
    "guard": "test_forbid_and_guard",
    "derive": "test_derive_lets_the_band_pass",
    "on_failure": "test_on_failure_blocks_and_nothing_else",
    "ttl_s": "test_ttl_s_of_the_policy_bounds_the_requests",
    "fixed_length": "test_fixed_length_is_refused_inside_vllm",
    "detect": "test_detect_presidio_finds_the_ssn",
    "max_segments": "test_max_segments_within_window_s",
    "window_s": "test_max_segments_within_window_s",
    "max_draws": "test_max_draws_of_one_record",
    "length_bucket": "test_length_bucket_of_one_shows_the_length",
    "on_leak": "test_on_leak_refuses_or_redacts_on_a_closed_edge",
    "channel": "test_text_hops.py::test_refusals",
    "restore": "test_text_hops.py::test_values_come_back_for_whom_the_edge_names_alone",
}


KEY_OPTIONS = {
    "tenant": "test_proxy.py::test_tenants_are_apart_from_end_to_end",
    "agent": "test_proxy.py::test_one_publishes_another_consumes_and_a_third_is_refused",
    "role": "test_proxy_roles.py::test_who_lists_inspects_and_revokes",
    "expires_at": "test_a_key_expires",
    "models": "test_models_of_a_key",
    "limits.requests_per_min": "test_requests_per_min",
    "limits.tokens_per_min": "test_tokens_per_min_counts_prompts_of_streams_too",
    "limits.concurrency": "test_concurrency_of_a_key",
}
