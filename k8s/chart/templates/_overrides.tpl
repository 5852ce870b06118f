{{/*
Keys of the processes' configurations that the chart's objects depend on: said a second time in
`config`, `server` or `extraArgs`, a process would do other than its pod, its Service, its probes and its
NetworkPolicy say. Each is refused with the value to use in its place.
*/}}

{{/*
Fail when a key is given. Takes rules: what to do, by dotted key; at: path of config in the values;
config; args: of the command line, argsAt: their path, flag: what a key is preceded by there.
*/}}
{{- define "kleash.refuse" -}}
{{- range $key, $remedy := .rules -}}
{{- $tree := $.config -}}
{{- $isGiven := true -}}
{{- range $part := splitList "." $key -}}
{{- if and $isGiven (kindIs "map" $tree) (hasKey (default dict $tree) $part) -}}
{{- $tree = index $tree $part -}}
{{- else -}}
{{- $isGiven = false -}}
{{- end -}}
{{- end -}}
{{- if $isGiven -}}
{{- fail (printf "%s.%s is %s: %s" $.at $key (toJson $tree) $remedy) -}}
{{- end -}}
{{- range $.args -}}
{{- if regexMatch (printf "^--%s%s(=|$)" $.flag $key) . -}}
{{- fail (printf "%s has %s: %s" $.argsAt . $remedy) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Keys of every `server`, and what to do in their place. */}}
{{- define "kleash.serverRules" -}}
{{- range $key, $port := dict "port" 50051 "health_port" 8081 "metrics_port" 9090 }}
{{ $key }}: "pods, Services, probes and NetworkPolicies of the chart name port {{ $port }}; take it out"
{{- end }}
http_port: "Services and NetworkPolicies must know of it; use reward.http.enabled or trainer.http.enabled, as no other process has one"
{{- range $key := list "cert" "key" }}
tls.{{ $key }}: "clients of the release would not know of it; use auth.tls"
{{- end }}
{{- range $key := list "mode" "tokens_file" "audience" }}
auth.{{ $key }}: "clients of the release would not know of it; use auth.mode and its section"
{{- end }}
{{- end -}}

{{- define "kleash.checkOverrides" -}}
{{- range (include "kleash.workloads" . | fromJson).items -}}
{{- include "kleash.checkServer" (dict "root" $ "key" .key "services" .services) -}}
{{- end -}}
{{- if .Values.trainer.enabled }}{{ include "kleash.checkTrainerConfig" . }}{{ end -}}
{{- $folder := "the folder and the record of a run follow from its name; use run.id" -}}
{{- if .Values.demo.enabled -}}
{{- $fixed := "the URIs demo://... lead to /runs/demo, where a restarted Job goes on; take it out" -}}
{{- $rules := dict "out" $fixed "resume" $fixed "run_id" $folder -}}
{{- include "kleash.refuse" (dict "rules" $rules "at" "demo.config" "config" .Values.demo.config "args" .Values.demo.extraArgs "argsAt" "demo.extraArgs" "flag" "") -}}
{{- end -}}
{{- range $key := list "sft" "rewardModel" -}}
{{- $values := index $.Values $key -}}
{{- if $values.enabled -}}
{{- $rules := dict "out" $folder "run_id" $folder "model" (printf "an init container brings the model; use %s.model.uri" $key) -}}
{{- include "kleash.refuse" (dict "rules" $rules "at" (printf "%s.config" $key) "config" $values.config "args" $values.extraArgs "argsAt" (printf "%s.extraArgs" $key) "flag" "") -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The process of one workload. Takes root, key, services. */}}
{{- define "kleash.checkServer" -}}
{{- $values := index .root.Values .key -}}
{{- $args := dict "args" $values.extraArgs "argsAt" (printf "%s.extraArgs" .key) -}}
{{- $rules := include "kleash.serverRules" . | fromYaml -}}
{{- $grace := "the time that a pod has to end in follows from %s; use that" -}}
{{- $longest := ternary "the longest maxRequestSeconds of the packed services" (printf "%s.maxRequestSeconds" .key) (eq .key "packed") -}}
{{- $_ := set $rules "drain_announce_s" (printf $grace (printf "%s.drain.announceSeconds" .key)) -}}
{{- $_ := set $rules "drain_delay_s" (printf $grace (printf "%s.drain.delaySeconds" .key)) -}}
{{- range list "drain_grace_s" "max_request_s" }}{{ $_ := set $rules . (printf $grace $longest) }}{{ end -}}
{{- $callers := ternary "allowedCallers of the service" (printf "%s.allowedCallers" .key) (eq .key "packed") -}}
{{- $_ := set $rules "auth.allowed_callers" (printf "the release's own pods would be missing; use %s" $callers) -}}
{{- $_ := set $rules "http_allowed_origins" "the reward service has a value for it; use reward.http.allowedOrigins" -}}
{{- $_ := set $rules "audit" (printf "it has a value of its own; use %s.audit" .key) -}}
{{- if hasKey $values "quotas" }}{{ $_ := set $rules "quotas" (printf "the release's own trainer would be missing; use %s.quotas" .key) }}{{ end -}}
{{- include "kleash.refuse" (merge (dict "rules" $rules "at" (printf "%s.server" .key) "config" $values.server "flag" "server[.]") $args) -}}
{{- range $service := .services -}}
{{- $rules := dict "model" (printf "an init container brings the model; use %s.model.uri" $service) -}}
{{- if eq $service "reward" -}}
{{- $_ := set $rules "models" "init containers bring the models; use reward.models" -}}
{{- $_ := set $rules "default" "the trainer's value network starts from that model; use reward.default" -}}
{{- if $.root.Values.reward.models -}}
{{- range list "name" "function" "ensemble" "remote" }}{{ $_ := set $rules . "it does nothing beside reward.models; use reward.models.NAME.config" }}{{ end -}}
{{- else -}}
{{- range list "function" "ensemble" "remote" }}{{ $_ := set $rules . "a pod brings reward.model beside it; use reward.models.NAME.config, with reward.model.uri=\"\"" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if and (eq $service "policy") $.root.Values.trainer.enabled -}}
{{- $_ := set $rules "weights.publisher" "the policy gets its weights from the trainer of the release; set trainer.enabled=false for another one" -}}
{{- end -}}
{{- include "kleash.refuse" (merge (dict "rules" $rules "at" (printf "%s.config" $service) "config" (index $.root.Values $service).config "flag" (printf "%s[.]" $service)) $args) -}}
{{- if $.root.Values.demo.enabled -}}
{{- $key := printf "%sConfig" $service -}}
{{- include "kleash.refuse" (dict "rules" $rules "at" (printf "demo.%s" $key) "config" (index $.root.Values.demo $key)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "kleash.checkTrainerConfig" -}}
{{- $trainer := .Values.trainer -}}
{{- $args := dict "args" $trainer.extraArgs "argsAt" "trainer.extraArgs" -}}
{{- $server := include "kleash.serverRules" . | fromYaml -}}
{{- $_ := set $server "auth.allowed_callers" "the release's own pods would be missing; use trainer.allowedCallers" -}}
{{- $_ := set $server "audit" "it has a value of its own; use trainer.audit" -}}
{{- include "kleash.refuse" (merge (dict "rules" $server "at" "trainer.server" "config" $trainer.server "flag" "server[.]") $args) -}}
{{- $run := "the folder and the record of a run follow from its name; use run.id" -}}
{{- $rules := dict "out" $run "run_id" $run -}}
{{- $_ := set $rules "resume" "the Job's next pod goes on where the last one was; take it out, and use another run.id to start anew" -}}
{{- $_ := set $rules "model" "an init container brings the model; use trainer.model.uri" -}}
{{- $_ := set $rules "reward_model" "an init container brings the model; use trainer.rewardModel.uri" -}}
{{- $_ := set $rules "server" "keys of the trainer's own service have a section of their own; use trainer.server" -}}
{{- range $key, $remedy := omit $server "port" "health_port" "metrics_port" -}}
{{- $_ := set $rules (printf "publish.server.%s" $key) $remedy -}}
{{- end -}}
{{- $_ := set $rules "publish.server.port" "pods, Services and NetworkPolicies of the chart name port 50061; take it out" -}}
{{- include "kleash.refuse" (merge (dict "rules" $rules "at" "trainer.config" "config" $trainer.config "flag" "") $args) -}}
{{- if .Values.demo.enabled -}}
{{- include "kleash.refuse" (dict "rules" $rules "at" "demo.trainerConfig" "config" .Values.demo.trainerConfig) -}}
{{- end -}}
{{- end -}}

{{/*
What makes the pods of packed services is under `packed`: the same under their own sections would have no
effect. files/packed-defaults.yaml holds these keys with the defaults of values.yaml.
*/}}
{{- define "kleash.checkPacked" -}}
{{- $defaults := .Files.Get "files/packed-defaults.yaml" | fromYaml -}}
{{- range $service := include "kleash.packedServices" . | fromJsonArray -}}
{{- range $part := list "all" $service -}}
{{- include "kleash.refuseChanged" (dict "service" $service "path" "" "values" (index $.Values $service) "defaults" (get $defaults $part) "isTop" true) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Takes service, path: of the values in its section, values, defaults, and may take isTop: other keys are no matter. */}}
{{- define "kleash.refuseChanged" -}}
{{- $keys := keys .defaults -}}
{{- if not .isTop }}{{ $keys = concat $keys (keys .values) }}{{ end -}}
{{- range $key := uniq $keys | sortAlpha -}}
{{- $path := trimPrefix "." (printf "%s.%s" $.path $key) -}}
{{- $value := index $.values $key -}}
{{- $default := index $.defaults $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $default) -}}
{{- include "kleash.refuseChanged" (dict "service" $.service "path" $path "values" $value "defaults" $default) -}}
{{- else if ne (toJson $value) (toJson $default) -}}
{{- fail (printf "%s.%s is %s, and the pod of a packed service takes it from packed.%s; set that, or take %s out of packed.services" $.service $path (toJson $value) $path $.service) -}}
{{- end -}}
{{- end -}}
{{- end -}}
