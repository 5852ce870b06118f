{{/* What the reward service alone has: several models by name, and the HTTP port. */}}

{{/*
Models of reward.models: {"items": [{name, spec, config}, ...]} as JSON; spec as of kleash.modelSpec, with an
empty uri for what is no folder: functions, ensembles, models of other services.
*/}}
{{- define "kleash.rewardModels" -}}
{{- $items := list -}}
{{- range $name, $own := .Values.reward.models -}}
{{- $own = merge (deepCopy $own) (dict "uri" "" "existingSecret" "" "sha256" "" "config" dict) -}}
{{- if not (hasKey $own "waitSeconds") }}{{ $_ := set $own "waitSeconds" nil }}{{ end -}}
{{- $items = append $items (dict "name" $name "spec" (include "kleash.modelSpec" (dict "own" $own "from" dict) | fromJson) "config" $own.config) -}}
{{- end -}}
{{- toJson (dict "items" $items) -}}
{{- end -}}

{{/* Name of the model for calls that name none; only with reward.models. */}}
{{- define "kleash.rewardDefault" -}}
{{- default (keys .Values.reward.models | first) .Values.reward.default -}}
{{- end -}}

{{/*
Section `reward` of serve.json with several models, but for what reward.config says. The demo's keys of a
model go to each that is a folder.
*/}}
{{- define "kleash.rewardSection" -}}
{{- $shared := list "limits" "admins" "model_folders" "keep_previous_s" -}}
{{- $demo := ternary .Values.demo.rewardConfig dict .Values.demo.enabled -}}
{{- $models := dict -}}
{{- range (include "kleash.rewardModels" . | fromJson).items -}}
{{- $section := dict -}}
{{- if .spec.uri -}}
{{- $_ := set $section "model" (include "kleash.model" (dict "root" $ "uri" .spec.uri) | fromJson).folder -}}
{{- range $key, $value := $demo }}{{ if not (has $key $shared) }}{{ $_ := set $section $key $value }}{{ end }}{{ end -}}
{{- end -}}
{{- $_ := set $models .name (include "kleash.merge" (dict "base" $section "over" .config) | fromJson) -}}
{{- end -}}
{{- $section := dict "models" $models "default" (include "kleash.rewardDefault" .) -}}
{{- range $key, $value := $demo }}{{ if has $key $shared }}{{ $_ := set $section $key $value }}{{ end }}{{ end -}}
{{- toJson $section -}}
{{- end -}}

{{/* What leads to the HTTP port from outside, as JSON: paths, and whether all below them is meant. */}}
{{- define "kleash.httpPaths" -}}
{{- $paths := list (dict "path" "/v1" "isPrefix" true) -}}
{{- range list "/get_reward" "/openapi.json" "/docs" "/healthz" "/readyz" -}}
{{- $paths = append $paths (dict "path" . "isPrefix" false) -}}
{{- end -}}
{{- toJson $paths -}}
{{- end -}}

{{/* Name of the objects that lead there. */}}
{{- define "kleash.httpName" -}}
{{- include "kleash.name" (dict "root" . "component" "reward-http") -}}
{{- end -}}

{{/* Contradictions in the values of the reward service. */}}
{{- define "kleash.checkReward" -}}
{{- if .Values.reward.enabled -}}
{{- include "kleash.checkRewardModels" . -}}
{{- include "kleash.checkHttp" . -}}
{{- end -}}
{{- end -}}

{{- define "kleash.checkRewardModels" -}}
{{- $reward := .Values.reward -}}
{{- $names := keys $reward.models | sortAlpha -}}
{{- if and $names $reward.model.uri -}}
{{- fail (printf "reward.models and reward.model.uri (%s) are both set; move that model into reward.models and set reward.model.uri=\"\"" $reward.model.uri) -}}
{{- end -}}
{{- if and (gt (len $names) 1) (not $reward.default) -}}
{{- fail (printf "reward.models has %s; set reward.default to the one for calls that name none" (join ", " $names)) -}}
{{- end -}}
{{- if and $reward.default (not (has $reward.default $names)) -}}
{{- fail (printf "reward.default is %s, and reward.models has %s; use one of those" $reward.default (default "none" (join ", " $names))) -}}
{{- end -}}
{{- range (include "kleash.rewardModels" . | fromJson).items -}}
{{- if and (not .spec.uri) (not (or .config.function .config.ensemble .config.remote)) -}}
{{- fail (printf "reward.models.%s has no model; set its uri, or config with function, ensemble or remote" .name) -}}
{{- end -}}
{{- $at := printf "reward.models.%s.config" .name -}}
{{- $rules := dict "model" (printf "an init container brings the model; use reward.models.%s.uri" .name) "name" "it is served by its name in reward.models; take it out" -}}
{{- include "kleash.refuse" (dict "rules" $rules "at" $at "config" .config) -}}
{{- end -}}
{{- if and .Values.trainer.enabled $names (ne (dig "value" "init" "" .Values.trainer.config) "policy") (not (include "kleash.trainerRewardModelUri" .)) -}}
{{- fail (printf "the value network starts from a reward model, and reward.models.%s is no folder; set trainer.rewardModel.uri, or trainer.config.value.init=policy" (include "kleash.rewardDefault" .)) -}}
{{- end -}}
{{- end -}}

{{- define "kleash.checkHttp" -}}
{{- $http := .Values.reward.http -}}
{{- range $key := list "route" "ingress" -}}
{{- if and (index $http $key).enabled (not $http.enabled) -}}
{{- fail (printf "reward.http.%s is enabled and leads to the HTTP port, which reward.http.enabled=false keeps shut; set it to true" $key) -}}
{{- end -}}
{{- end -}}
{{- range $path, $value := dict "reward.http.allowedOrigins" $http.allowedOrigins "networkPolicy.rewardHttpClients" .Values.networkPolicy.rewardHttpClients -}}
{{- if and $value (not $http.enabled) -}}
{{- fail (printf "%s has no effect without the HTTP port; set reward.http.enabled=true or take it out" $path) -}}
{{- end -}}
{{- end -}}
{{- if and $http.route.enabled (not $http.route.parentRefs) -}}
{{- fail "reward.http.route is enabled and names no Gateway; set reward.http.route.parentRefs" -}}
{{- end -}}
{{- if and $http.ingress.tlsSecret (not $http.ingress.hostnames) -}}
{{- fail (printf "reward.http.ingress.tlsSecret is %s and no host is named that it is for; set reward.http.ingress.hostnames" $http.ingress.tlsSecret) -}}
{{- end -}}
{{- end -}}
