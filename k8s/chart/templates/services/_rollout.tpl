{{/*
Most pods that a component may have: an autoscaler's limit; 2, which stands for several, where null
leaves the number to others. Takes the values of a component.
*/}}
{{- define "kleash.mostReplicas" -}}
{{- if (.autoscaling).enabled -}}
{{- int .autoscaling.maxReplicas -}}
{{- else -}}
{{- ternary 2 (int .replicas) (kindIs "invalid" .replicas) -}}
{{- end -}}
{{- end -}}

{{/*
How pods are replaced: a new one first where there is room for it; with accelerators an old one
first, as there seldom is a spare one. Takes the values of a component.
*/}}
{{- define "kleash.strategy" -}}
{{- $replicas := include "kleash.mostReplicas" . | int -}}
{{- $hasDevices := or (gt (int .gpu.count) 0) (gt (len .resourceClaims) 0) -}}
{{- $isChosen := not (and (kindIs "invalid" .strategy.maxSurge) (kindIs "invalid" .strategy.maxUnavailable)) -}}
{{- $type := ternary "Recreate" "RollingUpdate" (and $hasDevices (le $replicas 1) (not $isChosen)) -}}
{{- $type = default $type .strategy.type -}}
type: {{ $type }}
{{- if eq $type "RollingUpdate" }}
rollingUpdate:
  maxSurge: {{ ternary (ternary 0 1 $hasDevices) .strategy.maxSurge (kindIs "invalid" .strategy.maxSurge) }}
  maxUnavailable: {{ ternary (ternary 1 0 $hasDevices) .strategy.maxUnavailable (kindIs "invalid" .strategy.maxUnavailable) }}
{{- end }}
{{- end -}}

{{/* Seconds for a pod to get its models, to start and to become ready, with ten minutes to spare. Takes root, workload. */}}
{{- define "kleash.progressDeadline" -}}
{{- $startup := .root.Values.probes.startup -}}
{{- $seconds := add 600 (mul (int $startup.periodSeconds) (int $startup.failureThreshold)) -}}
{{- range (include "kleash.podModels" (dict "root" .root "component" .workload.component) | fromJson).items -}}
{{- $seconds = add $seconds (int .waitSeconds) -}}
{{- end -}}
{{- $seconds -}}
{{- end -}}
