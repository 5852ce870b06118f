{{/*
The JSON that each process reads: what follows from the chart, under what the demo needs, under
`config` of the values.
*/}}

{{/*
Keys of `server` of a process. Host :: is every address of IPv4 and of IPv6: the pod's own would leave out
the loopback, where `kubectl port-forward` comes from. Takes root, component, key, keys: services, callers.
*/}}
{{- define "kleash.server" -}}
{{- $values := index .root.Values .key -}}
{{- $config := dict "host" "::" "port" 50051 "health_port" 8081 "metrics_port" 9090 -}}
{{- if ne .component "trainer" -}}
{{- $seconds := include "kleash.maxRequestSeconds" . | float64 -}}
{{- $_ := set $config "drain_announce_s" $values.drain.announceSeconds -}}
{{- $_ := set $config "drain_delay_s" $values.drain.delaySeconds -}}
{{- $_ := set $config "drain_grace_s" $seconds -}}
{{- $_ := set $config "max_request_s" $seconds -}}
{{- end -}}
{{- if include "kleash.hasHttp" (dict "root" .root "services" .keys) -}}
{{- $_ := set $config "http_port" 8080 -}}
{{- if and (has "reward" .keys) .root.Values.reward.http.allowedOrigins -}}
{{- $_ := set $config "http_allowed_origins" .root.Values.reward.http.allowedOrigins -}}
{{- end -}}
{{- end -}}
{{- with include "kleash.quotas" . | fromJsonArray }}{{ $_ := set $config "quotas" . }}{{ end -}}
{{- $config = merge $config (include "kleash.serverSecurity" . | fromJson) -}}
{{- include "kleash.merge" (dict "base" $config "over" $values.server) -}}
{{- end -}}

{{/* Longest call that a pod may have to finish. Takes root, keys. */}}
{{- define "kleash.maxRequestSeconds" -}}
{{- $longest := 0.0 -}}
{{- range .keys }}{{ $longest = maxf $longest (index $.root.Values .).maxRequestSeconds }}{{ end -}}
{{- $longest -}}
{{- end -}}

{{/* serve.json of a workload. Takes root, workload. */}}
{{- define "kleash.serveConfig" -}}
{{- $root := .root -}}
{{- $workload := .workload -}}
{{- $args := dict "root" $root "component" $workload.component "key" $workload.key "keys" $workload.services -}}
{{- $_ := set $args "callers" (include "kleash.callersOf" $args | fromJsonArray) -}}
{{- $config := dict "server" (include "kleash.server" $args | fromJson) -}}
{{- with $root.Values.tracing.endpoint -}}
{{- $_ := set $config "tracing" (dict "exporter" "otlp" "endpoint" . "sample_ratio" $root.Values.tracing.sampleRatio) -}}
{{- end -}}
{{- range $service := $workload.services -}}
{{- $section := dict -}}
{{- $hasModels := and (eq $service "reward") $root.Values.reward.models -}}
{{- if $hasModels -}}
{{- $section = include "kleash.rewardSection" $root | fromJson -}}
{{- else -}}
{{- $model := include "kleash.model" (dict "root" $root "uri" (include "kleash.modelUri" (dict "root" $root "service" $service))) | fromJson -}}
{{- $section = dict "model" $model.folder "name" $model.name -}}
{{- end -}}
{{- if eq $service "policy" -}}
{{- $weights := dict "spool" "/cache/weights" -}}
{{- if $root.Values.trainer.enabled -}}
{{- $_ := set $weights "publisher" (printf "%s:50061" (include "kleash.host" (dict "root" $root "service" "trainer"))) -}}
{{- end -}}
{{- $_ := set $section "weights" $weights -}}
{{- end -}}
{{- if and $root.Values.demo.enabled (not $hasModels) -}}
{{- $section = include "kleash.merge" (dict "base" $section "over" (index $root.Values.demo (printf "%sConfig" $service))) | fromJson -}}
{{- end -}}
{{- $section = include "kleash.merge" (dict "base" $section "over" (index $root.Values $service).config) | fromJson -}}
{{- $_ := set $config $service $section -}}
{{- end -}}
{{- toPrettyJson $config -}}
{{- end -}}

{{/* ppo.json. */}}
{{- define "kleash.ppoConfig" -}}
{{- $run := include "kleash.runId" . -}}
{{- $weights := printf "%s:50061" (include "kleash.host" (dict "root" . "service" "trainer")) -}}
{{- $args := dict "root" . "component" "trainer" "key" "trainer" "keys" (list "trainer") "callers" (list "test") -}}
{{- $fetchers := list (include "kleash.componentOf" (dict "root" . "service" "policy")) -}}
{{- $model := include "kleash.model" (dict "root" . "uri" (include "kleash.trainerModelUri" .)) | fromJson -}}
{{- $services := dict "discovery" "endpoint_slices" "wait_s" 900 -}}
{{- if .Values.policy.enabled -}}
{{- $_ := set $services "policy" (list (printf "%s:50051" (include "kleash.host" (dict "root" . "service" "policy-headless")))) -}}
{{- end -}}
{{- if .Values.reward.enabled -}}
{{- $_ := set $services "reward" (printf "dns:///%s:50051" (include "kleash.host" (dict "root" . "service" "reward-headless"))) -}}
{{- end -}}
{{- if .Values.reference.enabled -}}
{{- $_ := set $services "reference" (printf "dns:///%s:50051" (include "kleash.host" (dict "root" . "service" "reference-headless"))) -}}
{{- end -}}
{{- $store := merge (dict "host" "::" "port" 50061) (include "kleash.serverSecurity" (merge (dict "callers" $fetchers) $args) | fromJson) -}}
{{- $config := dict "out" (printf "/runs/%s/ppo" $run) "resume" true "run_id" $run "model" $model.folder "services" $services -}}
{{- $_ := set $config "publish" (dict "server" $store "address" $weights "lease" (include "kleash.name" $args)) -}}
{{- $_ := set $config "server" (include "kleash.server" $args | fromJson) -}}
{{- with .Values.tracing.endpoint -}}
{{- $_ := set $config "tracing" (dict "exporter" "otlp" "endpoint" . "sample_every" $.Values.tracing.sampleEvery) -}}
{{- end -}}
{{- with include "kleash.trainerRewardModelUri" . -}}
{{- $_ := set $config "reward_model" (include "kleash.model" (dict "root" $ "uri" .) | fromJson).folder -}}
{{- end -}}
{{- if .Values.demo.enabled -}}
{{- $config = include "kleash.merge" (dict "base" $config "over" .Values.demo.trainerConfig) | fromJson -}}
{{- end -}}
{{- include "kleash.merge" (dict "base" $config "over" .Values.trainer.config) | fromJson | toPrettyJson -}}
{{- end -}}

{{/* demo.json. */}}
{{- define "kleash.demoConfig" -}}
{{- $config := dict "out" "/runs/demo" "until" "reward_model" "resume" true "run_id" (include "kleash.runId" .) -}}
{{- if not .Values.demo.config.quick -}}
{{- $_ := set $config "settings" .Values.demo.settings -}}
{{- end -}}
{{- include "kleash.merge" (dict "base" $config "over" .Values.demo.config) | fromJson | toPrettyJson -}}
{{- end -}}

{{/* sft.json. */}}
{{- define "kleash.sftConfig" -}}
{{- $run := include "kleash.runId" . -}}
{{- $model := include "kleash.model" (dict "root" . "uri" .Values.sft.model.uri) | fromJson -}}
{{- $config := dict "model" $model.folder "out" (printf "/runs/%s/sft" $run) "run_id" $run -}}
{{- include "kleash.merge" (dict "base" $config "over" .Values.sft.config) | fromJson | toPrettyJson -}}
{{- end -}}

{{/* reward-model.json. */}}
{{- define "kleash.rewardModelConfig" -}}
{{- $run := include "kleash.runId" . -}}
{{- $model := include "kleash.model" (dict "root" . "uri" (include "kleash.rewardModelBaseUri" .)) | fromJson -}}
{{- $config := dict "model" $model.folder "out" (printf "/runs/%s/reward-model" $run) "run_id" $run -}}
{{- include "kleash.merge" (dict "base" $config "over" .Values.rewardModel.config) | fromJson | toPrettyJson -}}
{{- end -}}
