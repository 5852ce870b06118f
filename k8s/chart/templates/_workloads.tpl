{{/*
Which pods there are, and which service runs in which of them.

One Deployment per service, or several services in the one Deployment of `packed`. A workload is
{component, key, services}: component in names and labels, key in the values.
*/}}

{{- define "kleash.packedServices" -}}
{{- toJson (ternary .Values.packed.services list .Values.packed.enabled) -}}
{{- end -}}

{{/* {"items": [workload, ...]} as JSON. */}}
{{- define "kleash.workloads" -}}
{{- $items := list -}}
{{- $packed := include "kleash.packedServices" . | fromJsonArray -}}
{{- range $service := list "policy" "reward" "reference" -}}
{{- if and (index $.Values $service).enabled (not (has $service $packed)) -}}
{{- $items = append $items (dict "component" $service "key" $service "services" (list $service)) -}}
{{- end -}}
{{- end -}}
{{- if $packed -}}
{{- $items = append $items (dict "component" "packed" "key" "packed" "services" $packed) -}}
{{- end -}}
{{- toJson (dict "items" $items) -}}
{{- end -}}

{{/* Component of the pods that run a service. Takes root, service. */}}
{{- define "kleash.componentOf" -}}
{{- ternary "packed" .service (has .service (include "kleash.packedServices" .root | fromJsonArray)) -}}
{{- end -}}

{{/* Components of all pods that serve, without repetition, as JSON. */}}
{{- define "kleash.servingComponents" -}}
{{- $components := list -}}
{{- range (include "kleash.workloads" . | fromJson).items -}}
{{- $components = append $components .component -}}
{{- end -}}
{{- toJson $components -}}
{{- end -}}

{{/* Components of all pods, with those of Jobs and of `helm test`, as JSON. */}}
{{- define "kleash.components" -}}
{{- $components := include "kleash.servingComponents" . | fromJsonArray -}}
{{- if .Values.trainer.enabled }}{{ $components = append $components "trainer" }}{{ end -}}
{{- if .Values.demo.enabled }}{{ $components = append $components "demo" }}{{ end -}}
{{- if .Values.sft.enabled }}{{ $components = append $components "sft" }}{{ end -}}
{{- if .Values.rewardModel.enabled }}{{ $components = append $components "reward-model" }}{{ end -}}
{{- if .Values.tests.enabled }}{{ $components = append $components "test" }}{{ end -}}
{{- toJson $components -}}
{{- end -}}

{{/* Key in the values of a component. */}}
{{- define "kleash.valuesKey" -}}
{{- get (dict "reward-model" "rewardModel" "test" "tests") . | default . -}}
{{- end -}}

{{/* "true" when a process has the HTTP port. Takes root, services: those that it serves. */}}
{{- define "kleash.hasHttp" -}}
{{- $has := false -}}
{{- range .services }}{{ if ((index $.root.Values .).http).enabled }}{{ $has = true }}{{ end }}{{ end -}}
{{- if $has }}true{{ end -}}
{{- end -}}

{{/* Full name of a service's gRPC service. */}}
{{- define "kleash.grpcService" -}}
{{- printf "kleash.%s.v1.%sService" . (title .) -}}
{{- end -}}
