{{/*
Where models come from, and how they get into a pod.

  demo://NAME            /runs/demo/NAME, made by the demo Job on the release's claim
  pvc:///PATH            PATH on the release's claim, mounted at /runs
  pvc://CLAIM/PATH       PATH on another claim, mounted at /claims/CLAIM
  oci://IMAGE@sha256:..  an image volume, mounted at /models/NAME
  hf://, s3://, gs://, https://   downloaded to /models/NAME by an init container
*/}}

{{- define "kleash.runsClaim" -}}
{{- default (printf "%s-runs" (include "kleash.fullname" .)) .Values.runs.existingClaim -}}
{{- end -}}

{{/* Folder on the release's claim that a stage of the run writes. Takes root, stage. */}}
{{- define "kleash.stageUri" -}}
{{- printf "pvc:///%s/%s" (include "kleash.runId" .root) .stage -}}
{{- end -}}

{{/*
A model as a component gets it: {uri, existingSecret, sha256, waitSeconds} as JSON. One that is taken
over from another component comes with all that belongs to it, but for what the component says itself;
the same URI is the same model. Takes own: the values of a model, from: such a map or empty.
*/}}
{{- define "kleash.modelSpec" -}}
{{- $own := .own -}}
{{- $spec := dict "uri" $own.uri "existingSecret" $own.existingSecret "sha256" $own.sha256 "waitSeconds" $own.waitSeconds -}}
{{- if and .from (has $own.uri (list "" (.from).uri)) -}}
{{- $_ := set $spec "uri" .from.uri -}}
{{- $_ := set $spec "existingSecret" (default .from.existingSecret $own.existingSecret) -}}
{{- $_ := set $spec "sha256" (default .from.sha256 $own.sha256) -}}
{{- if kindIs "invalid" $own.waitSeconds }}{{ $_ := set $spec "waitSeconds" .from.waitSeconds }}{{ end -}}
{{- end -}}
{{- if kindIs "invalid" $spec.waitSeconds }}{{ $_ := set $spec "waitSeconds" 3600 }}{{ end -}}
{{- toJson $spec -}}
{{- end -}}

{{/*
Model of a service: given, the policy's, or what a Job of the release makes; of several reward models that
for calls that name none. Takes root, service.
*/}}
{{- define "kleash.serviceModel" -}}
{{- $values := .root.Values -}}
{{- $own := deepCopy (index $values .service).model -}}
{{- $from := dict -}}
{{- if and (eq .service "reward") $values.reward.models -}}
{{- $default := include "kleash.rewardDefault" .root -}}
{{- range (include "kleash.rewardModels" .root | fromJson).items }}{{ if eq .name $default }}{{ $own = .spec }}{{ end }}{{ end -}}
{{- end -}}
{{- if eq .service "reference" -}}
{{- $from = include "kleash.serviceModel" (dict "root" .root "service" "policy") | fromJson -}}
{{- else if and (not $own.uri) (eq .service "policy") $values.sft.enabled -}}
{{- $_ := set $own "uri" (include "kleash.stageUri" (dict "root" .root "stage" "sft")) -}}
{{- else if and (not $own.uri) (eq .service "reward") $values.rewardModel.enabled (not $values.reward.models) -}}
{{- $_ := set $own "uri" (include "kleash.stageUri" (dict "root" .root "stage" "reward-model")) -}}
{{- end -}}
{{- include "kleash.modelSpec" (dict "own" $own "from" $from) -}}
{{- end -}}

{{- define "kleash.modelUri" -}}
{{- (include "kleash.serviceModel" . | fromJson).uri -}}
{{- end -}}

{{/* What a URI names: {uri, scheme, folder, name, claim, image, usesRuns, isRemote, hasLineage} as JSON. Takes root, uri. */}}
{{- define "kleash.model" -}}
{{- $scheme := regexFind "^[a-z0-9]+" .uri -}}
{{- $rest := trimPrefix (printf "%s://" $scheme) .uri -}}
{{- $name := regexReplaceAll "@.*$" $rest "" | trimSuffix "/" | base -}}
{{- $model := dict "uri" .uri "scheme" $scheme "name" $name "claim" "" "image" "" "usesRuns" false "isRemote" false "hasLineage" false -}}
{{- if eq $scheme "demo" -}}
{{- $_ := set $model "folder" (printf "/runs/demo/%s" $rest) -}}
{{- $_ := set $model "usesRuns" true -}}
{{- $_ := set $model "hasLineage" true -}}
{{- else if eq $scheme "pvc" -}}
{{- $claim := regexFind "^[^/]*" $rest -}}
{{- $path := trimPrefix $claim $rest | trimAll "/" -}}
{{- if or (not $claim) (eq $claim (include "kleash.runsClaim" .root)) -}}
{{- $_ := set $model "folder" (printf "/runs/%s" $path) -}}
{{- $_ := set $model "usesRuns" true -}}
{{- /* What a stage of the run writes is complete when its kleash.json is there. */ -}}
{{- $_ := set $model "hasLineage" (or (hasPrefix "demo/" $path) (hasPrefix (printf "%s/" (include "kleash.runId" .root)) $path)) -}}
{{- else -}}
{{- $_ := set $model "claim" $claim -}}
{{- $_ := set $model "folder" (printf "/claims/%s/%s" $claim $path) -}}
{{- end -}}
{{- else -}}
{{- $_ := set $model "folder" (printf "/models/%s-%s" (regexReplaceAll "[^A-Za-z0-9._-]+" $name "-") (sha256sum .uri | trunc 8)) -}}
{{- if eq $scheme "oci" -}}
{{- $_ := set $model "image" $rest -}}
{{- else -}}
{{- $_ := set $model "isRemote" true -}}
{{- end -}}
{{- end -}}
{{- toJson $model -}}
{{- end -}}

{{/*
Models that a component's pod needs: {"items": [{label, model, secret, sha256, waitSeconds}, ...]} as JSON,
each folder once. Takes root, component.
*/}}
{{- define "kleash.podModels" -}}
{{- $root := .root -}}
{{- $wanted := list -}}
{{- if eq .component "trainer" -}}
{{- $wanted = append $wanted (dict "label" "model" "uri" (include "kleash.trainerModelUri" $root) "spec" (include "kleash.trainerModel" $root | fromJson)) -}}
{{- if include "kleash.trainerRewardModelUri" $root -}}
{{- $wanted = append $wanted (dict "label" "reward-model" "uri" (include "kleash.trainerRewardModelUri" $root) "spec" (include "kleash.trainerRewardModel" $root | fromJson)) -}}
{{- end -}}
{{- else if eq .component "sft" -}}
{{- $wanted = append $wanted (dict "label" "model" "uri" $root.Values.sft.model.uri "spec" (include "kleash.modelSpec" (dict "own" $root.Values.sft.model "from" dict) | fromJson)) -}}
{{- else if eq .component "reward-model" -}}
{{- $wanted = append $wanted (dict "label" "model" "uri" (include "kleash.rewardModelBaseUri" $root) "spec" (include "kleash.modelSpec" (dict "own" $root.Values.rewardModel.model "from" dict) | fromJson)) -}}
{{- else if has .component (list "policy" "reward" "reference" "packed") -}}
{{- $services := ternary $root.Values.packed.services (list .component) (eq .component "packed") -}}
{{- range $service := $services -}}
{{- if and (eq $service "reward") $root.Values.reward.models -}}
{{- range (include "kleash.rewardModels" $root | fromJson).items -}}
{{- if .spec.uri }}{{ $wanted = append $wanted (dict "label" (printf "reward-%s" .name) "uri" .spec.uri "spec" .spec) }}{{ end -}}
{{- end -}}
{{- else -}}
{{- $spec := include "kleash.serviceModel" (dict "root" $root "service" $service) | fromJson -}}
{{- $wanted = append $wanted (dict "label" $service "uri" $spec.uri "spec" $spec) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $items := list -}}
{{- $seen := list -}}
{{- range $wanted -}}
{{- $model := include "kleash.model" (dict "root" $root "uri" .uri) | fromJson -}}
{{- if not (has $model.folder $seen) -}}
{{- $seen = append $seen $model.folder -}}
{{- $items = append $items (dict "label" .label "model" $model "secret" .spec.existingSecret "sha256" .spec.sha256 "waitSeconds" .spec.waitSeconds) -}}
{{- end -}}
{{- end -}}
{{- toJson (dict "items" $items) -}}
{{- end -}}

{{- define "kleash.trainerModel" -}}
{{- $policy := include "kleash.serviceModel" (dict "root" . "service" "policy") | fromJson -}}
{{- include "kleash.modelSpec" (dict "own" .Values.trainer.model "from" $policy) -}}
{{- end -}}

{{- define "kleash.trainerRewardModel" -}}
{{- $reward := include "kleash.serviceModel" (dict "root" . "service" "reward") | fromJson -}}
{{- include "kleash.modelSpec" (dict "own" .Values.trainer.rewardModel "from" $reward) -}}
{{- end -}}

{{- define "kleash.trainerModelUri" -}}
{{- (include "kleash.trainerModel" . | fromJson).uri -}}
{{- end -}}

{{/* Empty when the value network starts from the policy and needs no reward model. */}}
{{- define "kleash.trainerRewardModelUri" -}}
{{- if ne (dig "value" "init" "" .Values.trainer.config) "policy" -}}
{{- (include "kleash.trainerRewardModel" . | fromJson).uri -}}
{{- end -}}
{{- end -}}

{{/* The model that reward-model training starts from: given, or what the release's SFT Job makes. */}}
{{- define "kleash.rewardModelBaseUri" -}}
{{- default (include "kleash.stageUri" (dict "root" . "stage" "sft")) .Values.rewardModel.model.uri -}}
{{- end -}}

{{/*
"true" when a component's process downloads data: every name of data that is no path is a data set of
the Hugging Face Hub. Takes root, component.
*/}}
{{- define "kleash.downloadsData" -}}
{{- if has .component (list "trainer" "sft" "reward-model") -}}
{{- $config := (index .root.Values (include "kleash.valuesKey" .component)).config -}}
{{- $data := list (get $config "data") (get $config "evaluation_data") (get $config "reference_data") (get $config "prompts") (dig "evaluation" "prompts" "" $config) (dig "ptx" "data" "" $config) -}}
{{- $remote := false -}}
{{- range $data }}{{ if and . (not (hasPrefix "/" .)) }}{{ $remote = true }}{{ end }}{{ end -}}
{{- if $remote }}true{{ end -}}
{{- end -}}
{{- end -}}

{{/* "true" when something of a component's pod is downloaded. Takes root, component. */}}
{{- define "kleash.downloads" -}}
{{- $remote := eq (include "kleash.downloadsData" .) "true" -}}
{{- range (include "kleash.podModels" . | fromJson).items -}}
{{- if .model.isRemote }}{{ $remote = true }}{{ end -}}
{{- end -}}
{{- if $remote }}true{{ end -}}
{{- end -}}

{{/* "true" when a component's pod mounts the release's claim. Takes root, component. */}}
{{- define "kleash.usesRuns" -}}
{{- $uses := has .component (list "trainer" "demo" "sft" "reward-model") -}}
{{- range (include "kleash.podModels" . | fromJson).items -}}
{{- if .model.usesRuns }}{{ $uses = true }}{{ end -}}
{{- end -}}
{{- if eq .component (include "kleash.componentOf" (dict "root" .root "service" "reward")) -}}
{{- range .root.Values.reward.config.model_folders }}{{ if regexMatch "^/runs(/|$)" . }}{{ $uses = true }}{{ end }}{{ end -}}
{{- end -}}
{{- if $uses }}true{{ end -}}
{{- end -}}
